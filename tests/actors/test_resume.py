"""Cut streams that go on with `Last-Event-ID`: after every event, here and elsewhere, to the byte."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from actors.front.front_door import FrontDoor, FrontLimits
from model.text.tokenizer import load_tokenizer
from protos.coordinator_pb2 import FINISH_REASON_STOP, SequenceOutput, Submit
from tests.support.front import MODEL, VOCAB, ask, make_front
from tests.support.scripted_coordinator import Event, ScriptedCoordinator, saying
from tests.support.tokenizers import EOS_ID, write_byte_tokenizer

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
SAID = "one twö three 😀 four"
HELLO = [{"role": "user", "content": "hi"}]
USAGE = {"include_usage": True, "continuous_usage_stats": True}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path, VOCAB)
    return path


def speaker(model_dir: Path) -> ScriptedCoordinator:
    return ScriptedCoordinator(saying(load_tokenizer(model_dir).encode(SAID, add_bos=False), EOS_ID))


def door(model_dir: Path, **changes: Any) -> tuple[FrontDoor, ScriptedCoordinator]:
    coordinator = speaker(model_dir)
    return make_front(model_dir, coordinator, **changes), coordinator


def send(front: FrontDoor, path: str, body: dict[str, Any], last: str | None = None) -> httpx2.Response:
    headers = {} if last is None else {"Last-Event-ID": last}
    whole = {"model": MODEL, "stream": True, **body}
    return ask(front, lambda client: client.post(path, json=whole, headers=headers))


def blocks(response: httpx2.Response) -> list[str]:
    """The events before [DONE], as they were framed."""
    assert response.status_code == 200, response.text
    *found, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return found


def id_of(block: str) -> str:
    first, second = block.split("\n")
    assert second.startswith("data: ")
    return first.removeprefix("id: ")


def data_of(block: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(block.split("\n")[1].removeprefix("data: "))
    return data


REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": (TEXT, {"prompt": "p", "max_tokens": 50}),
    "length": (TEXT, {"prompt": "p", "max_tokens": 7}),
    "stop": (TEXT, {"prompt": "p", "max_tokens": 50, "stop": ["three", "our"], "include_stop_str_in_output": True}),
    "held_back": (TEXT, {"prompt": "p", "max_tokens": 50, "stop": ["one two", " four five"]}),
    "echo": (TEXT, {"prompt": "pé", "max_tokens": 50, "echo": True}),
    "logprobs": (TEXT, {"prompt": "pé", "max_tokens": 50, "echo": True, "logprobs": 2, "stop": ["thr"]}),
    "scores": (TEXT, {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 1}),
    "ids": (TEXT, {"prompt": "p", "max_tokens": 50, "return_token_ids": True}),
    "usage": (TEXT, {"prompt": "p", "max_tokens": 50, "stream_options": USAGE}),
    "chat": (CHAT, {"messages": HELLO}),
    "chat_usage": (CHAT, {"messages": HELLO, "stream_options": USAGE, "stop": "four"}),
    "chat_logprobs": (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 1, "max_tokens": 9}),
    "chat_ids": (CHAT, {"messages": HELLO, "return_token_ids": True, "min_tokens": 2, "stop_token_ids": [9]}),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_another_ingress_goes_on_after_every_event(model_dir: Path, kind: str) -> None:
    path, body = REQUESTS[kind]
    whole = blocks(send(door(model_dir)[0], path, body))
    for place, block in enumerate(whole):
        elsewhere, coordinator = door(model_dir, draw_seed=lambda: 7)
        assert blocks(send(elsewhere, path, body, id_of(block))) == whole[place + 1 :]
        for submit in coordinator.submits:
            assert (submit.sampling.seed, list(submit.generated_token_ids)) == (1000, []), "it remembers nothing"


@pytest.mark.parametrize("kind", REQUESTS)
def test_the_same_ingress_goes_on_after_every_event(model_dir: Path, kind: str) -> None:
    path, body = REQUESTS[kind]
    here, coordinator = door(model_dir)
    whole = blocks(send(here, path, body))
    for place, block in enumerate(whole):
        coordinator.submits.clear()
        rest = blocks(send(here, path, body, id_of(block)))
        assert joined(rest) == joined(whole[place + 1 :])
        if "logprobs" not in body:
            assert not coordinator.submits, "all of it is remembered"


def joined(found: list[str]) -> dict[int, Any]:
    """What a client makes of a stream of one choice, whatever the pieces."""
    text, tokens, ids = "", [], []
    last: dict[str, Any] = {}
    for data in map(data_of, found):
        for choice in data["choices"]:
            text += choice.get("text", "") + choice.get("delta", {}).get("content", "")
            logprobs = choice.get("logprobs") or {}
            tokens += logprobs.get("content") or list(zip(*logprobs.values(), strict=True))
            ids += choice.get("token_ids", [])
            last = {
                **last,
                "finish": choice["finish_reason"],
                "stop": choice.get("stop_reason"),
            }
        last = {**last, "head": (data["id"], data["created"], data["system_fingerprint"]), "usage": data.get("usage")}
    return {0: (text, tokens, ids, last)}


def test_several_choices_each_go_on_where_they_were(model_dir: Path) -> None:
    body = {"prompt": ["p", "q"], "n": 2, "max_tokens": 50, "stream_options": USAGE}
    whole = blocks(send(door(model_dir)[0], TEXT, body))

    def texts(found: list[str]) -> list[str]:
        said = [""] * 4
        for data in map(data_of, found):
            for choice in data["choices"]:
                said[choice["index"]] += choice["text"]
        return said

    expected = texts(whole)
    assert expected == [SAID] * 4
    for place in range(len(whole)):
        rest = blocks(send(door(model_dir)[0], TEXT, body, id_of(whole[place])))
        before, after = texts(whole[: place + 1]), texts(rest)
        assert [one + other for one, other in zip(before, after, strict=True)] == expected
        usages = [data_of(block)["usage"] for block in (*whole[place:], *rest) if data_of(block)["usage"]]
        assert rest == [] or usages[-1] == data_of(whole[-1])["usage"]


def test_a_drawn_seed_travels_and_a_chain_of_cuts_is_one_stream(model_dir: Path) -> None:
    path, body = REQUESTS["chat"]
    seeds = iter([3**40, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15])
    whole: list[str] = []
    last: str | None = None
    while True:
        front, coordinator = door(model_dir, draw_seed=lambda: next(seeds))
        rest = blocks(send(front, path, body, last))
        assert {submit.sampling.seed for submit in coordinator.submits} <= {3**40}
        whole += rest[:3]
        if not rest:
            break
        last = id_of(whole[-1])
    assert "".join(data_of(block)["choices"][0]["delta"].get("content", "") for block in whole) == SAID
    assert len({data_of(block)["id"] for block in whole}) == 1
    assert data_of(whole[-1])["choices"][0]["finish_reason"] == "stop"


def test_half_an_answer_that_is_remembered_is_asked_for_from_there(model_dir: Path) -> None:
    """The client lost its connection in the middle, and comes back to the same ingress."""
    said = load_tokenizer(model_dir).encode(SAID, add_bos=False)
    answers = [5, None]

    def script(submit: Submit) -> list[Event]:
        stop = answers.pop(0)
        events = list(saying(said, EOS_ID)(submit))
        return events if stop is None else [*events[:stop], ValueError("the connection is cut")]

    coordinator = ScriptedCoordinator(script)
    front = make_front(model_dir, coordinator)
    body = {"prompt": "p", "max_tokens": 50}
    first = blocks(send(front, TEXT, body))
    assert data_of(first[-2])["choices"], "then an error without an id"
    rest = blocks(send(front, TEXT, body, id_of(first[2])))
    assert list(coordinator.submits[1].generated_token_ids) == said[:5]
    assert "".join(data_of(block)["choices"][0]["text"] for block in (*first[:3], *rest)) == SAID


def test_a_finished_stream_is_only_done(model_dir: Path) -> None:
    for path, body in REQUESTS.values():
        front, coordinator = door(model_dir)
        last = id_of(blocks(send(door(model_dir)[0], path, body))[-1])
        assert blocks(send(front, path, body, last)) == []
        assert not coordinator.submits


# --- refusals ---


def refused(response: httpx2.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    assert error["param"] == "Last-Event-ID"
    assert "Last-Event-ID" in error["message"]
    return response.status_code, error["code"], error["message"]


def test_what_cannot_go_on_is_refused_by_name(model_dir: Path) -> None:
    path, body = REQUESTS["chat"]
    now = [1_800_000_000.0]
    front, coordinator = door(model_dir, wall_clock=lambda: now[0], limits=FrontLimits(resume_s=60.0))
    last = id_of(blocks(send(front, path, body))[1])
    coordinator.submits.clear()
    assert refused(send(front, path, body, "nonsense"))[:2] == (400, "invalid_value")
    other = {**body, "messages": [{"role": "user", "content": "ho"}]}
    assert refused(send(front, path, other, last))[:2] == (409, "event_id_mismatch")
    assert refused(send(front, path, {**body, "temperature": 0.5}, last))[:2] == (409, "event_id_mismatch")
    assert refused(send(front, TEXT, {"prompt": "hi"}, last))[:2] == (409, "event_id_mismatch")
    assert refused(send(front, path, {**body, "stream": False}, last))[:2] == (400, "invalid_value")
    changed = make_front(model_dir, coordinator, system_fingerprint="fp_other")
    assert refused(send(changed, path, body, last))[:2] == (409, "system_fingerprint_changed")
    now[0] += 61
    assert refused(send(front, path, body, last))[:2] == (410, "event_id_expired")
    assert not coordinator.submits


def test_the_time_counts_from_the_event_and_not_from_the_beginning(model_dir: Path) -> None:
    """So that a stream that has run for long can be resumed, too."""
    path, body = REQUESTS["text"]
    now = [1_800_000_000.0]

    def somewhere() -> FrontDoor:
        return door(model_dir, wall_clock=lambda: now[0], limits=FrontLimits(resume_s=60.0))[0]

    last = id_of(blocks(send(somewhere(), path, body))[1])
    for _ in range(3):
        now[0] += 50
        last = id_of(blocks(send(somewhere(), path, body, last))[0])
    assert data_of(blocks(send(somewhere(), path, body, last))[0])["created"] == 1_800_000_000


def test_a_forged_id_harms_nobody(model_dir: Path) -> None:
    path, body = REQUESTS["text"]
    last = id_of(blocks(send(door(model_dir)[0], path, body))[0])
    elsewhere, _ = door(model_dir)
    assert refused(send(elsewhere, path, body, last.replace("-1o", "-51o")))[0] == 400
    assert refused(send(elsewhere, path, body, last + ".1o"))[0] == 400
    for position in ("-50o", "-49s", "-3n", "-0s", "-0o"):
        forged = blocks(send(elsewhere, path, body, last.replace("-1o", position)))
        assert data_of(forged[-1])["choices"][0]["finish_reason"] == "stop"


def test_a_browser_that_says_nothing_begins_anew(model_dir: Path) -> None:
    path, body = REQUESTS["text"]
    assert joined(blocks(send(door(model_dir)[0], path, body, "")))[0][0] == SAID


def test_outputs_of_many_tokens_are_split_where_the_client_was(model_dir: Path) -> None:
    said = load_tokenizer(model_dir).encode(SAID, add_bos=False)
    path, body = REQUESTS["text"]
    whole = blocks(send(door(model_dir)[0], path, body))
    at_once = ScriptedCoordinator(
        lambda submit: [SequenceOutput(token_ids=[*said, EOS_ID], finish_reason=FINISH_REASON_STOP)]
    )
    for place, block in enumerate(whole[:-1]):
        rest = blocks(send(make_front(model_dir, at_once), path, body, id_of(block)))
        assert len(rest) == 1
        assert joined(rest) == joined(whole[place + 1 :])
