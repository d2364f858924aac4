"""The routes, in-process, over scripted coordinators: bodies, streams, refusals. Real sockets: test_ingress_socket."""

import asyncio
import json
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.front.coordinator_client import CoordinatorLost
from actors.front.front_door import FrontDoor, FrontLimits
from actors.front.resubmission import MAX_INTERNAL_RETRIES
from model.text.chat_template import ChatTemplate
from model.text.tokenizer import load_tokenizer
from protos.coordinator_pb2 import SequenceOutput
from protos.expert_pb2 import (
    STATUS_DEADLINE_EXCEEDED,
    STATUS_DRAINING,
    STATUS_INTERNAL,
    STATUS_INVALID,
    STATUS_OVERLOADED,
)
from tests.support.front import CONTEXT, MODEL, VOCAB, ask, client_of, make_front, post, run
from tests.support.idle_clock import run_idle
from tests.support.scripted_coordinator import Event, Script, ScriptedCoordinator, failing, losing, raising, saying
from tests.support.tokenizers import BOS_ID, EOS_ID, mixtral_sentencepiece, write_byte_tokenizer

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path, VOCAB)
    return path


def ids_of(model_dir: Path, text: str) -> list[int]:
    return load_tokenizer(model_dir).encode(text, add_bos=False)


def speaker(model_dir: Path, text: str) -> ScriptedCoordinator:
    """A coordinator that says `text` and stops."""
    return ScriptedCoordinator(saying(ids_of(model_dir, text), EOS_ID))


def events(response: httpx2.Response) -> list[dict[str, Any]]:
    """The events of a stream; checks its framing to the byte."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = response.content.decode("ascii").split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    told = [block.split("\n") for block in blocks[:-2]]
    datas = [lines.pop() for lines in told]
    assert all(data.startswith("data: {") for data in datas)
    answers = [json.loads(data.removeprefix("data: ")) for data in datas]
    for lines, answer in zip(told, answers, strict=True):
        assert [line.startswith("id: 1-") for line in lines] == ([] if "error" in answer else [True])
    return answers


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """The error object, which has exactly OpenAI's four fields."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


# --- whole answers ---


def test_a_completion(model_dir: Path) -> None:
    coordinator = speaker(model_dir, " world")
    response = post(make_front(model_dir, coordinator), TEXT, prompt="hello", max_tokens=50)
    assert response.status_code == 200
    body = response.json()
    assert body.pop("id").startswith("cmpl-")
    choice = {"index": 0, "text": " world", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    num_prompt = len(ids_of(model_dir, "hello")) + 1
    num_said = len(ids_of(model_dir, " world")) + 1
    assert body == {
        "object": "text_completion",
        "created": 1_800_000_000,
        "model": MODEL,
        "system_fingerprint": "fp_test",
        "choices": [choice],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_said,
            "total_tokens": num_prompt + num_said,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_what_the_coordinator_is_asked(model_dir: Path) -> None:
    coordinator = speaker(model_dir, "x")
    front = make_front(model_dir, coordinator)
    post(front, TEXT, prompt="hello")
    post(
        front,
        TEXT,
        prompt=[5, 6],
        max_tokens=3,
        min_tokens=2,
        stop_token_ids=[9],
        ignore_eos=True,
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.25,
        seed=-1,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logprobs=2,
    )
    plain, full = coordinator.submits
    assert list(plain.prompt_token_ids) == [BOS_ID, *ids_of(model_dir, "hello")]
    assert (plain.max_tokens, plain.min_tokens, plain.ignore_eos, list(plain.stop_token_ids)) == (16, 0, False, [])
    assert not plain.HasField("logprobs")
    assert plain.deadline_unix_us == int((1_800_000_000 + 600) * 1e6)
    sampling = plain.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed) == (1, 1, 0, 0, 1000)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1, 0, 0)
    assert plain.request_id != full.request_id
    assert list(full.prompt_token_ids) == [5, 6]
    assert (full.max_tokens, full.min_tokens, full.ignore_eos, list(full.stop_token_ids)) == (3, 2, True, [9])
    sampling = full.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 0, 0.25)
    assert sampling.seed == 2**64 - 1
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, 0.5, -0.5)
    assert full.logprobs == 2


def test_top_p_of_zero_keeps_one_token(model_dir: Path) -> None:
    coordinator = speaker(model_dir, "x")
    post(make_front(model_dir, coordinator), TEXT, prompt="a", top_p=0)
    assert (coordinator.submits[0].sampling.top_p, coordinator.submits[0].sampling.top_k) == (1, 1)


def test_a_chat_completion(model_dir: Path) -> None:
    coordinator = speaker(model_dir, "Hello! 你好")
    body = post(make_front(model_dir, coordinator), CHAT, messages=HELLO).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello! 你好", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    (submit,) = coordinator.submits
    assert submit.prompt_token_ids[0] == BOS_ID
    assert submit.max_tokens == CONTEXT - len(submit.prompt_token_ids), "a chat may fill the context"
    assert body["usage"]["prompt_tokens"] == len(submit.prompt_token_ids)


def test_max_completion_tokens_goes_before_max_tokens(model_dir: Path) -> None:
    coordinator = speaker(model_dir, "abcdef")
    body = post(make_front(model_dir, coordinator), CHAT, messages=HELLO, max_tokens=5, max_completion_tokens=2).json()
    assert coordinator.submits[0].max_tokens == 2
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


def test_n_choices_of_several_prompts(model_dir: Path) -> None:
    coordinator = speaker(model_dir, "ok")
    body = post(make_front(model_dir, coordinator), TEXT, prompt=["a", [7, 8, 9]], n=2, seed=40).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in body["choices"]} == {"ok"}
    assert [list(submit.prompt_token_ids)[-1] for submit in coordinator.submits] == [*ids_of(model_dir, "a") * 2, 9, 9]
    assert [submit.sampling.seed for submit in coordinator.submits] == [40, 41, 40, 41]
    said = len(ids_of(model_dir, "ok")) + 1
    counts = {"prompt_tokens": 2 + 3, "completion_tokens": 4 * said, "total_tokens": 5 + 4 * said}
    assert body["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": 0}}


def test_a_stop_string_cuts_the_text_and_cancels_the_rest(model_dir: Path) -> None:
    coordinator = speaker(model_dir, "one two three four")
    front = make_front(model_dir, coordinator)
    body = post(front, TEXT, prompt="count", max_tokens=40, stop=["two t", "never"]).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one ", "stop", "two t")
    assert coordinator.cancelled == [coordinator.submits[0].request_id]
    assert body["usage"]["completion_tokens"] == len(ids_of(model_dir, "one two t")), "counted up to the stop string"
    included = post(front, TEXT, prompt="count", max_tokens=40, stop="two t", include_stop_str_in_output=True).json()
    assert included["choices"][0]["text"] == "one two t"


def test_special_tokens_are_left_out_unless_asked_for(model_dir: Path) -> None:
    front = make_front(
        model_dir, ScriptedCoordinator(saying([*ids_of(model_dir, "a"), BOS_ID, *ids_of(model_dir, "b")]))
    )
    assert post(front, TEXT, prompt="p").json()["choices"][0]["text"] == "ab"
    assert post(front, TEXT, prompt="p", skip_special_tokens=False).json()["choices"][0]["text"] == "a<s>b"


def test_token_ids_on_request(model_dir: Path) -> None:
    front = make_front(model_dir, speaker(model_dir, "hey"))
    said = [*ids_of(model_dir, "hey"), EOS_ID]
    choice = post(front, TEXT, prompt=[7, 8], return_token_ids=True).json()["choices"][0]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == (said, [7, 8])
    body = post(front, CHAT, messages=HELLO, return_token_ids=True).json()
    assert body["choices"][0]["token_ids"] == said
    assert body["prompt_token_ids"][0] == BOS_ID
    streamed = events(post(front, CHAT, messages=HELLO, return_token_ids=True, stream=True))
    parts = [event["choices"][0].get("token_ids", []) for event in streamed]
    assert [token for part in parts for token in part] == said


# --- log-probabilities and echo ---


def test_chat_logprobs(model_dir: Path) -> None:
    front = make_front(model_dir, speaker(model_dir, "é!"))
    body = post(front, CHAT, messages=HELLO, logprobs=True, top_logprobs=2).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "é!"
    assert content[-1]["token"] == "!"
    assert content[-1]["logprob"] == -0.5
    assert [other["token"] for other in content[-1]["top_logprobs"]] == ["!", '"']
    without = post(front, CHAT, messages=HELLO, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in without] == [[]] * len(content)


def test_completion_logprobs_with_offsets(model_dir: Path) -> None:
    front = make_front(model_dir, speaker(model_dir, "aé!"))
    logprobs = post(front, TEXT, prompt="p", logprobs=2).json()["choices"][0]["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert (logprobs["tokens"][0], logprobs["tokens"][-1]) == ("a", "!")
    assert (logprobs["text_offset"][0], logprobs["text_offset"][-1]) == (0, 2)
    assert logprobs["token_logprobs"] == [-0.5] * len(logprobs["tokens"])
    assert logprobs["top_logprobs"][0] == {"a": -0.5, "b": -1.0}
    assert len(logprobs["tokens"]) == len(ids_of(model_dir, "aé!")), "the end of sequence is not text"


def test_part_of_a_character_is_named_by_its_bytes(model_dir: Path) -> None:
    euro = ids_of(model_dir, "€")
    assert len(euro) > 1
    front = make_front(model_dir, ScriptedCoordinator(saying(euro, EOS_ID)))
    logprobs = post(front, TEXT, prompt="p", logprobs=0).json()["choices"][0]["logprobs"]
    assert all(name.startswith("bytes:\\x") for name in logprobs["tokens"])
    assert logprobs["text_offset"] == [0] * len(euro)


def test_zero_logprobs_still_tells_the_chosen_one(model_dir: Path) -> None:
    front = make_front(model_dir, speaker(model_dir, "a"))
    logprobs = post(front, TEXT, prompt="p", logprobs=0).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"a": -0.5}]


def test_echo_puts_the_prompt_in_front(model_dir: Path) -> None:
    front = make_front(model_dir, speaker(model_dir, " there"))
    assert post(front, TEXT, prompt="hi", echo=True).json()["choices"][0]["text"] == "hi there"
    ids = ids_of(model_dir, "hé")
    assert post(front, TEXT, prompt=ids, echo=True).json()["choices"][0]["text"] == "hé there"
    streamed = events(post(front, TEXT, prompt="hi", echo=True, stream=True))
    assert streamed[0]["choices"][0]["text"].startswith("hi")
    assert "".join(event["choices"][0]["text"] for event in streamed) == "hi there"


def test_echo_with_logprobs_scores_the_prompt(model_dir: Path) -> None:
    coordinator = speaker(model_dir, "!")
    choice = post(make_front(model_dir, coordinator), TEXT, prompt="abé", echo=True, logprobs=1).json()["choices"][0]
    assert coordinator.submits[0].prompt_logprobs == 1
    assert choice["text"] == "abé!"
    logprobs = choice["logprobs"]
    prompt_ids = [BOS_ID, *ids_of(model_dir, "abé")]
    assert len(logprobs["tokens"]) == len(prompt_ids) + 1
    assert (logprobs["tokens"][0], logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == ("<s>", None, None)
    assert all(value == -0.5 for value in logprobs["token_logprobs"][1:])
    assert logprobs["text_offset"][:3] == [0, 0, 1]
    assert logprobs["text_offset"][-1] == 3, "generated tokens stand after the prompt"


def test_scoring_a_prompt_without_generating(model_dir: Path) -> None:
    coordinator = speaker(model_dir, "never said")
    front = make_front(model_dir, coordinator)
    body = post(front, TEXT, prompt=[7, 8, 9], echo=True, logprobs=0, max_tokens=0).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    counts = {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    assert body["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": 0}}
    assert coordinator.submits[0].max_tokens == 0
    nothing = post(front, TEXT, prompt="abc", echo=True, max_tokens=0).json()
    assert nothing["choices"][0]["text"] == "abc"
    assert len(coordinator.submits) == 1, "there is nothing to compute"


# --- streams ---


def test_a_chat_stream_is_framed_as_openai_frames_it(model_dir: Path) -> None:
    front = make_front(model_dir, speaker(model_dir, "hé"))
    chunks = events(post(front, CHAT, messages=HELLO, stream=True))
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"]["content"] for choice in choices[1:-1]] == ["h", "é"]
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


def test_usage_in_streams(model_dir: Path) -> None:
    front = make_front(model_dir, speaker(model_dir, "abc"))
    for path, prompt in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "p"})):
        whole = post(front, path, **prompt).json()["usage"]
        chunks = events(post(front, path, **prompt, stream=True, stream_options={"include_usage": True}))
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == whole
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = events(post(front, path, **prompt, stream=True, stream_options=options))
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        first = 0 if path == CHAT else 1  # the role comes before any token
        assert (counts[0], counts[-1]) == (first, whole["completion_tokens"])


def test_a_stream_of_several_choices(model_dir: Path) -> None:
    front = make_front(model_dir, speaker(model_dir, "abc"))
    texts = {0: "", 1: "", 2: ""}
    ended: list[int] = []
    for chunk in events(post(front, TEXT, prompt="p", n=3, stream=True)):
        (choice,) = chunk["choices"]
        assert choice["index"] not in ended
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ended.append(choice["index"])
    assert set(texts.values()) == {"abc"}
    assert sorted(ended) == [0, 1, 2]
    chat = events(post(front, CHAT, messages=HELLO, n=2, stream=True))
    greeted = [chunk["choices"][0]["index"] for chunk in chat if "role" in chunk["choices"][0]["delta"]]
    assert sorted(greeted) == [0, 1], "each choice gets its role once"


@pytest.mark.parametrize("text", ["one two three", "a\n\nb", "😀 é € 你好\u2028x"])
@pytest.mark.parametrize("stop", [[], ["two"], ["\n\n"], ["€", "e t"]])
def test_streams_say_what_whole_answers_say(model_dir: Path, text: str, stop: list[str]) -> None:
    front = make_front(model_dir, speaker(model_dir, text))
    asked: dict[str, Any] = {"stop": stop, "max_tokens": 60, "logprobs": 1}
    whole = post(front, TEXT, prompt="p", **asked).json()["choices"][0]
    parts = [chunk["choices"][0] for chunk in events(post(front, TEXT, prompt="p", **asked, stream=True))]
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert [offset for part in parts for offset in part["logprobs"]["text_offset"]] == whole["logprobs"]["text_offset"]
    assert parts[-1]["finish_reason"] == whole["finish_reason"]
    assert parts[-1]["stop_reason"] == whole["stop_reason"]


# --- refusals ---


def test_a_wrong_field_is_named(model_dir: Path) -> None:
    front = make_front(model_dir, speaker(model_dir, "x"))
    response = post(front, CHAT, messages=HELLO, temperature=3)
    assert response.status_code == 400
    assert error_of(response)["param"] == "temperature"
    assert error_of(post(front, TEXT, prompt="p", suffix="end"))["param"] == "suffix"
    assert error_of(post(front, TEXT, prompt=[VOCAB]))["param"] == "prompt"
    assert error_of(post(front, TEXT, prompt="p", stop_token_ids=[1, VOCAB]))["param"] == "stop_token_ids[1]"
    assert error_of(post(front, TEXT, prompt="p", max_tokens=3, min_tokens=4))["param"] == "min_tokens"
    assert error_of(post(front, TEXT, prompt=["p"] * 2, n=100))["param"] == "n"


def test_a_conversation_that_the_template_refuses(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    write_byte_tokenizer(tmp_path, VOCAB, chat_template=template)
    response = post(make_front(tmp_path, ScriptedCoordinator(saying([7]))), CHAT, messages=HELLO)
    assert (response.status_code, error_of(response)["param"]) == (400, "messages")
    assert "roles must alternate" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("messages", "param", "reason"),
    [
        (
            [{"role": "function", "content": "x"}],
            "messages[0].role",
            "'function' is not one of system, user,",
        ),
        ([*HELLO, {"role": "assistant", "content": "x"}], "messages", "the last message must be the user's"),
    ],
)
def test_a_message_that_the_built_in_format_refuses_is_named_once(
    tmp_path: Path, messages: list[dict[str, str]], param: str, reason: str
) -> None:
    shutil.copy(mixtral_sentencepiece(), tmp_path / "tokenizer.model")
    built_in = ChatTemplate({}, load_tokenizer(tmp_path))
    front = make_front(tmp_path, ScriptedCoordinator(saying([7])), chat_template=built_in)
    error = error_of(post(front, CHAT, messages=messages))
    assert error["param"] == param
    assert error["message"].startswith(f"Invalid value for '{param}': {reason}")


def test_a_prompt_that_does_not_fit(model_dir: Path) -> None:
    coordinator = speaker(model_dir, "x")
    front = make_front(model_dir, coordinator)
    too_long = [
        post(front, TEXT, prompt=[7] * CONTEXT),
        post(front, TEXT, prompt=[7] * (CONTEXT - 9), max_tokens=10),
        post(front, CHAT, messages=[{"role": "user", "content": "é" * CONTEXT}]),
        post(front, CHAT, messages=[{"role": "user", "content": "x" * 1_000_000}]),
        post(front, TEXT, prompt="x" * 1_000_000),
    ]
    for response in too_long:
        assert response.status_code == 400
        assert error_of(response)["code"] == "context_length_exceeded"
        assert f"maximum context length is {CONTEXT} tokens" in error_of(response)["message"]
    assert coordinator.submits == []
    fits = post(front, TEXT, prompt=[7] * (CONTEXT - 1)).json()
    assert coordinator.submits[0].max_tokens == 1, "the default of 16 shrinks to what fits"
    assert fits["usage"]["prompt_tokens"] == CONTEXT - 1


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"", {}, 400),
        (b"[]", {}, 400),
        (b'{"model": "tiny", "prompt": "\xff"}', {}, 400),
        (b'{"model": "tiny", "prompt": "\\ud800"}', {}, 400),
        (b'{"model": "tiny", "prompt": "p", "temperature": NaN}', {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"model": "tiny", "prompt": "p", "seed": ' + b"9" * 5000 + b"}", {}, 400),
        (b"model=tiny", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (b'{"model": "tiny", "prompt": "p"}', {"content-type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_broken_bodies(model_dir: Path, content: bytes, headers: dict[str, str], status: int) -> None:
    front = make_front(model_dir, speaker(model_dir, "x"))
    sent = {"content-type": "application/json", **headers}
    response = ask(front, lambda client: client.post(TEXT, content=content, headers=sent))
    assert response.status_code == status
    if status != 200:
        assert error_of(response)["type"] == "invalid_request_error"


def test_a_body_over_the_cap_is_not_read_to_its_end(model_dir: Path) -> None:
    front = make_front(model_dir, speaker(model_dir, "x"), limits=FrontLimits(max_body_bytes=1000))
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while sent < 100:
            sent += 1
            yield b" " * 300

    headers = {"content-type": "application/json"}
    response = ask(front, lambda client: client.post(TEXT, content=endless(), headers=headers))
    assert (response.status_code, sent) == (413, 4)
    claimed = ask(front, lambda client: client.post(TEXT, content=b" " * 1001, headers=headers))
    assert (claimed.status_code, error_of(claimed)["code"]) == (413, "request_too_large")


def test_unknown_models_routes_and_methods(model_dir: Path) -> None:
    front = make_front(model_dir, speaker(model_dir, "x"))
    unknown = post(front, TEXT, prompt="p", model="gpt-5")
    assert unknown.status_code == 404
    assert error_of(unknown) == {
        "message": "The model `gpt-5` does not exist or you do not have access to it.",
        "type": "invalid_request_error",
        "param": None,
        "code": "model_not_found",
    }
    route = ask(front, lambda client: client.get("/v1/engines"))
    assert (route.status_code, error_of(route)["message"]) == (404, "Invalid URL (GET /v1/engines)")
    method = ask(front, lambda client: client.get(CHAT))
    assert (method.status_code, error_of(method)["code"], method.headers["allow"]) == (
        405,
        "method_not_supported",
        "POST",
    )


def test_models_and_health(model_dir: Path) -> None:
    front = make_front(model_dir, coordinator := speaker(model_dir, "x"))
    card = {"id": MODEL, "object": "model", "created": 1_700_000_000, "owned_by": "octavo", "max_model_len": CONTEXT}
    assert ask(front, lambda client: client.get("/v1/models")).json() == {"object": "list", "data": [card]}
    assert ask(front, lambda client: client.get(f"/v1/models/{MODEL}")).json() == card
    missing = ask(front, lambda client: client.get("/v1/models/org/other"))
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")
    assert ask(front, lambda client: client.get("/health")).status_code == 200
    coordinator.reply.state = "loading"
    sick = ask(make_front(model_dir, coordinator), lambda client: client.get("/health"))
    assert (sick.status_code, error_of(sick)["code"]) == (503, "service_unavailable")


# --- what coordinators refuse, and how they fail ---


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (failing(STATUS_INVALID, "max_tokens is 5, but 3 tokens are left"), 400, "invalid_value"),
        (failing(STATUS_OVERLOADED, "queue full", retry_after_ms=4000), 429, "rate_limit_exceeded"),
        (failing(STATUS_DRAINING, "draining"), 503, "service_unavailable"),
        (failing(STATUS_DEADLINE_EXCEEDED, "late"), 504, "request_timeout"),
        (failing(STATUS_INTERNAL, "expert-3 at 10.0.0.7 said NaN"), 500, "internal_error"),
        (raising(CoordinatorLost("10.0.0.7 is gone")), 503, "service_unavailable"),
        (raising(ValueError("secret detail")), 500, "internal_error"),
        (lambda submit: iter(()), 503, "service_unavailable"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_before_the_first_token_are_plain_errors(
    model_dir: Path, script: Script, status: int, code: str, stream: bool
) -> None:
    response = post(make_front(model_dir, ScriptedCoordinator(script)), CHAT, messages=HELLO, stream=stream)
    assert response.status_code == status
    error = error_of(response)
    assert error["code"] == code
    assert "10.0.0.7" not in error["message"]
    assert "secret" not in error["message"]
    assert ("retry-after" in response.headers) == (status in (429, 503))
    if status == 429:
        assert response.headers["retry-after"] == "4"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (failing(STATUS_INTERNAL, "secret", after=[70, 71]), "internal_error"),
        (raising(CoordinatorLost("secret"), after=[70, 71]), "service_unavailable"),
        (raising(ValueError("secret"), after=[70, 71]), "internal_error"),
    ],
)
def test_failures_in_mid_stream_are_an_event_and_then_done(model_dir: Path, script: Script, code: str) -> None:
    front = make_front(model_dir, ScriptedCoordinator(script))
    chunks = events(post(front, TEXT, prompt="p", stream=True))
    assert [len(chunk.get("choices", ())) for chunk in chunks] == [1, 1, 0]
    assert chunks[-1]["error"]["code"] == code
    assert "secret" not in json.dumps(chunks)
    assert f'octavo_stream_errors_total{{code="{code}"}} 1.0' in front.metrics.render().decode()


def test_the_other_choices_are_cancelled_when_one_fails(model_dir: Path) -> None:
    def script(submit: Any) -> Any:
        if submit.sampling.seed == 1:
            return failing(STATUS_INTERNAL, "no")(submit)
        return saying([7] * 30)(submit)

    coordinator = ScriptedCoordinator(script, hold_after=3)
    response = post(make_front(model_dir, coordinator), TEXT, prompt="p", n=3, seed=0, max_tokens=30)
    assert response.status_code == 500
    assert len(coordinator.submits) == 3 + MAX_INTERNAL_RETRIES
    assert sorted(coordinator.cancelled)[0] == coordinator.submits[0].request_id


def test_a_loading_coordinator_is_not_ready_rather_than_full(model_dir: Path) -> None:
    coordinator = ScriptedCoordinator(failing(STATUS_OVERLOADED, "still loading"))
    coordinator.reply.state = "loading"
    assert post(make_front(model_dir, coordinator), TEXT, prompt="p").status_code == 503


def test_another_coordinator_takes_over_before_the_first_token(model_dir: Path) -> None:
    scripts = (failing(STATUS_DRAINING, "no"), failing(STATUS_OVERLOADED, "no"), raising(CoordinatorLost("no")))
    for script in scripts:
        first, second = ScriptedCoordinator(script), speaker(model_dir, "ok")
        second.inflight_tokens = 5
        response = post(make_front(model_dir, first, second), TEXT, prompt="p")
        assert response.json()["choices"][0]["text"] == "ok"
        assert len(first.submits) == len(second.submits) == 1
    down, up = speaker(model_dir, "no"), speaker(model_dir, "ok")
    down.connected, up.inflight_tokens = False, 1000
    assert post(make_front(model_dir, down, up), TEXT, prompt="p").json()["choices"][0]["text"] == "ok"
    assert down.submits == []


@pytest.mark.parametrize("stream", [False, True])
def test_another_coordinator_goes_on_after_some_tokens(model_dir: Path, stream: bool) -> None:
    """Nothing twice, nothing missing; the other one is told what was said."""
    said = ids_of(model_dir, "one two")
    first = ScriptedCoordinator(losing(saying(said), 3), address="a:1")
    second = speaker(model_dir, "one two")
    second.inflight_tokens = 5
    front = make_front(model_dir, first, second)
    asked: dict[str, Any] = {"prompt": "p", "logprobs": 1, "echo": True, "stream": stream}
    response = post(front, TEXT, **asked)
    choices = [chunk["choices"][0] for chunk in events(response)] if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "pone two"
    names = [name for choice in choices for name in choice["logprobs"]["tokens"]]
    assert "".join(names) == "<s>pone two"
    (lost,), (again,) = first.submits, second.submits
    assert list(again.generated_token_ids) == said[:3]
    assert lost.HasField("prompt_logprobs")
    assert not again.HasField("prompt_logprobs"), "scores were told already"
    again.ClearField("generated_token_ids")
    lost.ClearField("prompt_logprobs")
    assert again == lost, "all else is the same, the deadline and the seed too"
    assert 'octavo_resubmissions_total{reason="lost"} 1.0' in front.metrics.render().decode()


def test_a_silent_coordinator_is_given_up_after_the_deadline(model_dir: Path) -> None:
    coordinator = ScriptedCoordinator(saying([7, 8]), hold_after=0)
    front = make_front(model_dir, coordinator, request_timeout_s=0.5, limits=FrontLimits(deadline_grace_s=0.5))

    async def work() -> None:
        async with client_of(front) as client:
            response = await client.post(TEXT, json={"model": MODEL, "prompt": "p"})
        assert (response.status_code, error_of(response)["code"]) == (504, "request_timeout")

    run_idle(work())
    assert coordinator.cancelled == [coordinator.submits[0].request_id]


def test_more_requests_than_the_door_bears_are_refused_at_once(model_dir: Path) -> None:
    coordinator = ScriptedCoordinator(saying([7, 8]), hold_after=1)
    front = make_front(model_dir, coordinator, limits=FrontLimits(max_requests=1))

    async def work() -> httpx2.Response:
        async with client_of(front) as client:
            holding = asyncio.create_task(client.post(TEXT, json={"model": MODEL, "prompt": "p"}))
            await coordinator.held.wait()
            refused = await client.post(CHAT, json={"model": MODEL, "messages": HELLO})
            assert (await client.get("/health")).status_code == 200
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)
            return refused

    response = run(work())
    assert (response.status_code, error_of(response)["type"]) == (429, "rate_limit_error")
    assert response.headers["retry-after"] == "1"
    assert coordinator.cancelled == [submit.request_id for submit in coordinator.submits]
    text = front.metrics.render().decode()
    assert "octavo_client_disconnects_total 1.0" in text
    assert 'octavo_http_requests_total{endpoint="/v1/completions",status="499"} 1.0' in text


# --- manners ---


class RecordingTokenizer:
    """The real one, and on which thread it was used."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.threads: list[str] = []

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        self.threads.append(threading.current_thread().name)
        ids: list[int] = self._inner.encode(text, add_bos=add_bos)
        return ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_long_prompts_are_read_off_the_event_loop(model_dir: Path) -> None:
    tokenizer = RecordingTokenizer(load_tokenizer(model_dir))
    limits = FrontLimits(inline_chars=100)
    front = make_front(model_dir, speaker(model_dir, "x"), tokenizer=tokenizer, limits=limits)
    assert post(front, TEXT, prompt="a" * 100).status_code == 200
    assert post(front, TEXT, prompt="a" * 101).status_code == 200
    assert tokenizer.threads[0] == threading.current_thread().name
    assert tokenizer.threads[1].startswith("text")


@pytest.mark.parametrize("script", [saying([70, EOS_ID]), raising(ValueError("broken")), failing(STATUS_INTERNAL, "x")])
def test_prompts_are_never_logged(model_dir: Path, caplog: pytest.LogCaptureFixture, script: Script) -> None:
    caplog.set_level("DEBUG")
    front = make_front(model_dir, ScriptedCoordinator(script))
    post(front, TEXT, prompt="the-secret-prompt")
    post(front, CHAT, messages=[{"role": "user", "content": "the-secret-prompt"}], temperature=9)
    ask(front, lambda client: client.post(TEXT, content=b'{"prompt": "the-secret-prompt"'))
    assert "the-secret-prompt" not in caplog.text


def test_a_defect_is_answered_logged_and_counted(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    front = make_front(model_dir, ScriptedCoordinator(raising(ValueError("broken part"))))
    response = post(front, TEXT, prompt="p")
    assert (response.status_code, error_of(response)["message"]) == (
        500,
        "The server had an error while processing your request.",
    )
    assert "broken part" in caplog.text
    assert "octavo_unexpected_errors_total 1.0" in front.metrics.render().decode()


sampled_fields = [
    *("prompt", "messages", "n", "stop", "max_tokens", "logprobs", "echo", "stream", "temperature", "top_p", "top_k"),
    *("seed", "min_tokens", "stop_token_ids", "stream_options", "model", "return_token_ids", "ignore_eos"),
    *("logit_bias", "bad_words", "allowed_token_ids", "prompt_logprobs", "truncate_prompt_tokens", "priority"),
    *("cache_salt", "request_id", "add_special_tokens", "continue_final_message", "chat_template_kwargs"),
]
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 400)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from([MODEL, HELLO])
)
bodies = st.dictionaries(
    st.sampled_from(sampled_fields),
    st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=6,
)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(bodies)
def test_no_body_is_answered_with_500(model_dir: Path, body: dict[str, Any]) -> None:
    front = make_front(model_dir, speaker(model_dir, "some text to say"))
    essentials: Sequence[tuple[str, dict[str, Any]]] = ((TEXT, {"prompt": "p"}), (CHAT, {"messages": HELLO}))

    async def work() -> None:
        async with client_of(front) as client:
            for path, needed in essentials:
                response = await client.post(path, json={"model": MODEL, **needed, **body})
                assert response.status_code in (200, 400, 404), response.text
                if response.status_code != 200:
                    error_of(response)

    run(work())


def test_outputs_of_many_tokens_are_one_chunk(model_dir: Path) -> None:
    """A slow reader gets several steps in one output."""

    def script(submit: Any) -> list[Event]:
        ids = ids_of(model_dir, "several")
        return [SequenceOutput(token_ids=ids), *saying([], EOS_ID)(submit)]

    front: FrontDoor = make_front(model_dir, ScriptedCoordinator(script))
    chunks = events(post(front, TEXT, prompt="p", stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["several", ""]
