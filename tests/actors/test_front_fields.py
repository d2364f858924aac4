"""Request fields on their way: what a coordinator is asked for, and what the answer says of them."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from actors.front.planning import MAX_PROMPT_SCORES
from actors.front.token_rules import MAX_BAD_WORD_TOKENS
from model.text.tokenizer import load_tokenizer
from protos.coordinator_pb2 import Submit
from protos.expert_pb2 import STATUS_DRAINING
from tests.support.front import CONTEXT, MODEL, VOCAB, ask, make_front, post
from tests.support.scripted_coordinator import ScriptedCoordinator, failing, raising, saying
from tests.support.tokenizers import BOS_ID, EOS_ID, write_byte_tokenizer

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path, VOCAB)
    return path


def ids_of(model_dir: Path, text: str) -> list[int]:
    return load_tokenizer(model_dir).encode(text, add_bos=False)


def asked(model_dir: Path, path: str = TEXT, **body: Any) -> Submit:
    """What the coordinator is asked for a request that is accepted."""
    coordinator = ScriptedCoordinator(saying([70, 71], EOS_ID))
    essentials: dict[str, Any] = {"prompt": "p"} if path == TEXT else {"messages": HELLO}
    response = post(make_front(model_dir, coordinator), path, **{**essentials, **body})
    assert response.status_code == 200, response.text
    return coordinator.submits[0]


def refusal(model_dir: Path, path: str = TEXT, **body: Any) -> dict[str, Any]:
    coordinator = ScriptedCoordinator(saying([70]))
    essentials: dict[str, Any] = {"prompt": "p"} if path == TEXT else {"messages": HELLO}
    response = post(make_front(model_dir, coordinator), path, **{**essentials, **body})
    assert response.status_code == 400, response.text
    assert coordinator.submits == []
    error: dict[str, Any] = response.json()["error"]
    return error


def whole(model_dir: Path, path: str = TEXT, said: str = "ok", **body: Any) -> dict[str, Any]:
    front = make_front(model_dir, ScriptedCoordinator(saying(ids_of(model_dir, said), EOS_ID)))
    response = post(front, path, **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


# --- rules about tokens ---


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_rules_about_tokens_reach_the_coordinator(model_dir: Path, path: str) -> None:
    submit = asked(model_dir, path, logit_bias={"7": -100, "0": 1.5}, allowed_token_ids=[5, 6], bad_words=["the", " a"])
    sampling = submit.sampling
    assert list(zip(sampling.logit_bias_ids, sampling.logit_bias_values, strict=True)) == [(7, -100.0), (0, 1.5)]
    assert list(sampling.allowed_token_ids) == [5, 6]
    spelled = [ids_of(model_dir, text) for text in ("the", " the", "a", " a")]
    assert [list(word.ids) for word in sampling.bad_words] == spelled
    plain = asked(model_dir, path).sampling
    assert [len(plain.logit_bias_ids), len(plain.allowed_token_ids), len(plain.bad_words)] == [0, 0, 0]


def test_a_word_is_spelled_as_where_it_begins_a_text_and_as_after_a_space_and_once_only(model_dir: Path) -> None:
    words = asked(model_dir, bad_words=["  x", "x", " ", "</s>"]).sampling.bad_words
    expected = [ids_of(model_dir, text) for text in ("x", " x", " ", "  ", "</s>", " </s>")]
    assert [list(word.ids) for word in words] == expected
    assert expected[4] == [EOS_ID]


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"logit_bias": {str(VOCAB): 1}}, "logit_bias", f"token ids must be below {VOCAB}"),
        (
            {"allowed_token_ids": [1, VOCAB]},
            "allowed_token_ids[1]",
            f"it is {VOCAB}, but the vocabulary has",
        ),
        (
            {"bad_words": [chr(0x4E00 + n) * 255 for n in range(8)]},
            "bad_words",
            f"the words must have at most {MAX_BAD_WORD_TOKENS} tokens in all",
        ),
    ],
    ids=str,
)
def test_rules_that_do_not_fit_the_model_are_refused_by_name(
    model_dir: Path, body: dict[str, Any], param: str, reason: str
) -> None:
    error = refusal(model_dir, **body)
    assert (error["param"], error["code"], error["type"]) == (param, "invalid_value", "invalid_request_error")
    assert f"'{param}'" in error["message"]
    assert reason in error["message"]


# --- prompts ---


def test_special_tokens_in_front_are_the_requests_choice(model_dir: Path) -> None:
    assert list(asked(model_dir, prompt="a").prompt_token_ids) == [BOS_ID, *ids_of(model_dir, "a")]
    assert list(asked(model_dir, prompt="a", add_special_tokens=False).prompt_token_ids) == ids_of(model_dir, "a")
    rendered = list(asked(model_dir, CHAT).prompt_token_ids)
    assert rendered[:2] != [BOS_ID, BOS_ID]
    assert list(asked(model_dir, CHAT, add_special_tokens=True).prompt_token_ids) == [BOS_ID, *rendered]
    assert refusal(model_dir, prompt="", add_special_tokens=False)["param"] == "prompt"


def test_a_prompt_is_truncated_only_on_request(model_dir: Path) -> None:
    ids = list(range(5, 15))
    assert list(asked(model_dir, prompt=ids, truncate_prompt_tokens=4).prompt_token_ids) == ids[-4:]
    right = asked(model_dir, prompt=ids, truncate_prompt_tokens=4, truncation_side="right")
    assert list(right.prompt_token_ids) == ids[:4]
    assert list(asked(model_dir, prompt=ids, truncate_prompt_tokens=40).prompt_token_ids) == ids
    assert refusal(model_dir, prompt=ids, truncate_prompt_tokens=0)["param"] == "prompt"
    fits = asked(model_dir, prompt=[7] * 600, truncate_prompt_tokens=-1, max_tokens=12)
    assert (len(fits.prompt_token_ids), fits.max_tokens) == (CONTEXT - 12, 12)
    assert refusal(model_dir, prompt=[7] * 600)["code"] == "context_length_exceeded"
    chat = asked(model_dir, CHAT, truncate_prompt_tokens=3)
    assert list(chat.prompt_token_ids) == list(asked(model_dir, CHAT).prompt_token_ids)[-3:]


def test_what_is_echoed_is_what_was_left(model_dir: Path) -> None:
    body = whole(model_dir, prompt="abcdef", truncate_prompt_tokens=2, echo=True)
    assert body["choices"][0]["text"] == "efok"
    assert body["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("prefill", ["The answer is", "  Sure:", "tail \n"])
def test_a_final_message_is_gone_on_with(model_dir: Path, prefill: str) -> None:
    messages = [*HELLO, {"role": "assistant", "content": prefill}]
    submit = asked(model_dir, CHAT, messages=messages, continue_final_message=True)
    text = load_tokenizer(model_dir).decode(submit.prompt_token_ids, skip_special=False)
    assert text.endswith(f"assistant\n{prefill}")
    ended = load_tokenizer(model_dir).decode(asked(model_dir, CHAT, messages=messages).prompt_token_ids, False)
    assert ended.endswith("<|im_start|>assistant\n")


def test_variables_reach_the_template_and_ours_are_ours(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, VOCAB, chat_template="{{ mood }}:{{ messages[0].content }}")
    submit = asked(tmp_path, CHAT, chat_template_kwargs={"mood": "</s>gay"})
    assert list(submit.prompt_token_ids) != [EOS_ID, *ids_of(tmp_path, "gay:hi")], "a user's text is no control token"
    assert load_tokenizer(tmp_path).decode(submit.prompt_token_ids, skip_special=False) == "</s>gay:hi"
    for name in ("messages", "add_generation_prompt", "self", "tokenizer", "continue_final_message", "bos_token"):
        error = refusal(tmp_path, CHAT, chat_template_kwargs={name: 1})
        assert error["param"] == "chat_template_kwargs"
        assert f"{name}: is not a variable that a request may set" in error["message"]
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    assert "nested deeper" in refusal(tmp_path, CHAT, chat_template_kwargs={"x": deep})["message"]


def test_a_template_that_hides_the_final_message_cannot_go_on_with_it(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, VOCAB, chat_template="{{ messages[0].content }}")
    messages = [*HELLO, {"role": "assistant", "content": "unseen"}]
    error = refusal(tmp_path, CHAT, messages=messages, continue_final_message=True)
    assert error["param"] == "continue_final_message"


# --- scores of the prompt ---


def score(text: str, logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": text}


def test_prompt_logprobs_of_a_completion_are_vllms(model_dir: Path) -> None:
    body = whole(model_dir, prompt=[7, 70, 71], prompt_logprobs=2, n=2)
    expected = [
        None,
        {"70": score("A", -0.5, 1), "71": score("B", -1.0, 2)},
        {"71": score("B", -0.5, 1), "72": score("C", -1.0, 2)},
    ]
    assert [choice["prompt_logprobs"] for choice in body["choices"]] == [expected, expected]
    assert body["choices"][0]["logprobs"] is None
    assert "prompt_logprobs" not in whole(model_dir, prompt=[7, 70, 71])["choices"][0]


def test_prompt_logprobs_of_a_chat_are_the_bodys_and_asked_for_once(model_dir: Path) -> None:
    coordinator = ScriptedCoordinator(saying([70], EOS_ID))
    body = post(make_front(model_dir, coordinator), CHAT, messages=HELLO, prompt_logprobs=0, n=3).json()
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]
    assert body["prompt_logprobs"][0] is None
    assert all(len(place) == 1 for place in body["prompt_logprobs"][1:])
    assert [submit.HasField("prompt_logprobs") for submit in coordinator.submits] == [True, False, False]


def test_echo_and_prompt_logprobs_have_as_many_alternatives_as_each_asked_for(model_dir: Path) -> None:
    body = whole(model_dir, prompt=[7, 70], echo=True, logprobs=1, prompt_logprobs=3)
    choice = body["choices"][0]
    assert [len(place or ()) for place in choice["prompt_logprobs"]] == [0, 3]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"A": -0.5}]
    fewer = whole(model_dir, prompt=[7, 70], echo=True, logprobs=3, prompt_logprobs=0)["choices"][0]
    assert [len(place or ()) for place in fewer["prompt_logprobs"]] == [0, 1]
    assert len(fewer["logprobs"]["top_logprobs"][1]) == 3


def test_scores_of_one_request_are_bounded(model_dir: Path) -> None:
    """All count: prompts of 400 tokens, 6 choices of each, 20 alternatives and the token itself."""
    prompts = [[7] * 400] * 21
    assert 20 * 400 * 6 * 21 < MAX_PROMPT_SCORES < 21 * 400 * 6 * 21
    error = refusal(model_dir, prompt=prompts, n=6, prompt_logprobs=20, max_tokens=1)
    assert (error["param"], error["code"]) == ("prompt_logprobs", "invalid_value")
    assert f"at most {MAX_PROMPT_SCORES} scores, not {21 * 400 * 6 * 21}" in error["message"]
    assert refusal(model_dir, prompt=prompts, n=6, echo=True, logprobs=20, max_tokens=1)["param"] == "logprobs"
    coordinator = ScriptedCoordinator(failing(STATUS_DRAINING, "not now"))
    post(make_front(model_dir, coordinator), TEXT, prompt=prompts[:20], n=6, prompt_logprobs=20, max_tokens=1)
    assert coordinator.submits, "these are not too many"


def test_half_a_character_and_an_id_without_a_piece_are_scored_too(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, VOCAB)
    front = make_front(tmp_path, ScriptedCoordinator(saying([70], EOS_ID)), vocab_size=VOCAB + 4)
    half = ids_of(tmp_path, "€")[0]
    body = post(front, TEXT, prompt=[7, half, VOCAB + 1], prompt_logprobs=0).json()
    texts = [next(iter(place.values()))["decoded_token"] for place in body["choices"][0]["prompt_logprobs"][1:]]
    assert texts == ["\ufffd", ""]


def test_tokens_as_ids(model_dir: Path) -> None:
    text = whole(model_dir, said="A", prompt="p", logprobs=1, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    assert text["tokens"] == ["token_id:70"]
    assert text["top_logprobs"] == [{"token_id:70": -0.5}]
    chat = whole(model_dir, CHAT, "A", messages=HELLO, logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True)
    (token,) = chat["choices"][0]["logprobs"]["content"]
    assert token["token"] == "token_id:70"
    assert token["bytes"] == [65]
    assert [other["token"] for other in token["top_logprobs"]] == ["token_id:70", "token_id:71"]


def test_a_streams_first_chunk_of_each_choice_alone_has_the_prompts_tokens(model_dir: Path) -> None:
    front = make_front(model_dir, ScriptedCoordinator(saying([70, 71, 72], EOS_ID)))
    response = post(front, TEXT, prompt=[7, 8], n=2, stream=True, return_token_ids=True)
    choices = [chunk["choices"][0] for chunk in chunks_of(response)]
    assert [choice["index"] for choice in choices if "prompt_token_ids" in choice] in ([0, 1], [1, 0])
    assert next(choice for choice in choices if choice["index"] == 1)["prompt_token_ids"] == [7, 8]
    said = [token for choice in choices if choice["index"] == 0 for token in choice["token_ids"]]
    assert said == [70, 71, 72, EOS_ID]


def chunks_of(response: httpx2.Response) -> list[dict[str, Any]]:
    lines = response.text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


# --- priority, salt, tenant ---


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_priority_and_salt_reach_the_coordinator(model_dir: Path, path: str) -> None:
    assert asked(model_dir, path, priority=-7).priority == -7
    assert asked(model_dir, path).priority == 0
    assert asked(model_dir, path).cache_salt == b""
    assert asked(model_dir, path, cache_salt="sölt").cache_salt == "sölt".encode()


# --- request ids ---


def send(model_dir: Path, headers: dict[str, str], path: str = CHAT, **body: Any) -> httpx2.Response:
    front = make_front(model_dir, ScriptedCoordinator(saying([70, 71], EOS_ID)))
    essentials: dict[str, Any] = {"prompt": "p"} if path == TEXT else {"messages": HELLO}
    content = {"model": MODEL, **essentials, **body}
    return ask(front, lambda client: client.post(path, json=content, headers=headers))


@pytest.mark.parametrize("own", ["a", "0e37df36-f698-11e6-8dd4-cb9ced3df976", "Root=1-678.9:a_b/c+d", "x" * 64])
@pytest.mark.parametrize(("path", "prefix"), [(TEXT, "cmpl"), (CHAT, "chatcmpl")])
def test_a_requests_own_id_is_the_answers(model_dir: Path, own: str, path: str, prefix: str) -> None:
    response = send(model_dir, {"X-Request-Id": own}, path)
    assert response.headers.get_list("x-request-id") == [own]
    assert response.json()["id"] == f"{prefix}-{own}"
    streamed = send(model_dir, {"X-Request-Id": own}, path, stream=True)
    assert streamed.headers["x-request-id"] == own
    assert {chunk["id"] for chunk in chunks_of(streamed)} == {f"{prefix}-{own}"}


@pytest.mark.parametrize("bad", ["", "x" * 65, "two words", "a~b", "tab\there", "quote'", "ü"])
def test_what_is_no_id_is_replaced_by_a_new_one(model_dir: Path, bad: str) -> None:
    response = send(model_dir, {"X-Request-Id": bad.encode("latin-1")})  # type: ignore[dict-item]
    drawn = response.headers["x-request-id"]
    assert len(drawn) == 24
    assert drawn != bad
    assert response.json()["id"] == f"chatcmpl-{drawn}"
    assert send(model_dir, {}).headers["x-request-id"] != drawn


def test_the_bodys_id_is_second_to_the_headers(model_dir: Path) -> None:
    assert send(model_dir, {}, request_id="body-1").json()["id"] == "chatcmpl-body-1"
    assert send(model_dir, {"X-Request-Id": "head"}, request_id="body-1").json()["id"] == "chatcmpl-head"


def test_errors_and_every_other_answer_have_an_id_too(model_dir: Path) -> None:
    assert send(model_dir, {"X-Request-Id": "mine"}, temperature=9).headers["x-request-id"] == "mine"
    front = make_front(model_dir, ScriptedCoordinator(lambda submit: [ValueError("broken")]))

    async def use(client: httpx2.AsyncClient) -> None:
        for method, path in (("GET", "/health"), ("GET", "/nowhere"), ("DELETE", CHAT), ("GET", "/v1/models/other")):
            response = await client.request(method, path, headers={"X-Request-Id": "mine"})
            assert response.headers["x-request-id"] == "mine", path
        broken = await client.post(CHAT, json={"model": MODEL, "messages": HELLO}, headers={"X-Request-Id": "mine"})
        assert (broken.status_code, broken.headers["x-request-id"]) == (500, "mine")

    ask(front, use)


@pytest.mark.parametrize("stream", [False, True])
def test_a_defect_is_logged_with_the_requests_id(
    model_dir: Path, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    front = make_front(model_dir, ScriptedCoordinator(raising(ValueError("broken"), after=[70])))
    body = {"model": MODEL, "prompt": "p", "max_tokens": 9, "stream": stream}
    ask(front, lambda client: client.post(TEXT, json=body, headers={"X-Request-Id": "find-me"}))
    assert "find-me" in caplog.text


def test_a_stream_that_goes_on_keeps_its_id_whatever_the_new_connection_calls_itself(model_dir: Path) -> None:
    front = make_front(model_dir, ScriptedCoordinator(saying([70, 71, 72, 73], EOS_ID)))
    body = {"model": MODEL, "prompt": "p", "stream": True, "seed": 5}

    async def use(client: httpx2.AsyncClient) -> None:
        begun = await client.post(TEXT, json=body, headers={"X-Request-Id": "first-2-3o"})
        lines = begun.text.splitlines()
        second = [line[4:] for line in lines if line.startswith("id: ")][1]
        assert "~first-2-3o-" in second
        headers = {"X-Request-Id": "later", "Last-Event-ID": second}
        rest = await client.post(TEXT, json=body, headers=headers)
        assert rest.headers["x-request-id"] == "later"
        assert {chunk["id"] for chunk in chunks_of(rest)} == {"cmpl-first-2-3o"}
        texts = ["".join(chunk["choices"][0]["text"] for chunk in chunks_of(part)) for part in (begun, rest)]
        assert texts[0].endswith(texts[1])
        assert len(texts[0]) - len(texts[1]) == 2

    ask(front, use)


def test_equal_ids_of_two_requests_do_not_mix_their_memories(model_dir: Path) -> None:
    """Both streams are remembered, each under a name of its own, or one could be resumed with the other's tokens."""
    front = make_front(model_dir, ScriptedCoordinator(saying([70, 71, 72], EOS_ID)))
    body = {"model": MODEL, "prompt": "p", "stream": True, "seed": 5}

    async def use(client: httpx2.AsyncClient) -> None:
        for _ in range(2):
            await client.post(TEXT, json=body, headers={"X-Request-Id": "same"})

    ask(front, use)
    assert len(front.memory) == 2
