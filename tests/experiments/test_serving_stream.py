"""From bytes to events to a result: pure, with times given."""

import json
from typing import Any

import pytest

from experiments.serving.results import RequestFailed
from experiments.serving.sse import MAX_EVENT_BYTES, EventReader
from experiments.serving.stream_record import StreamRecord
from tests.support.raw_http import token, usage

BODY = b": ping\r\n\r\ndata: one\n\nevent: x\ndata:two\ndata:  three\r\n\r\n\n\ndata: unfinished"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_come_out_however_the_bytes_are_cut(size: int) -> None:
    reader = EventReader()
    events = [event for at in range(0, len(BODY), size) for event in reader.push(BODY[at : at + size])]
    assert events == [b"one", b"two\n three"]


@pytest.mark.parametrize("line", [b"x" * 2**16, b"data: " + b"x" * 2**16 + b"\n"], ids=["no line end", "no event end"])
def test_an_endless_event_is_refused(line: bytes) -> None:
    reader = EventReader()
    for _ in range(15):
        reader.push(line)
    with pytest.raises(RequestFailed, match=f"bad_stream: an event has more than {MAX_EVENT_BYTES} bytes"):
        reader.push(line * 2)


def test_the_bound_is_for_one_event_and_not_for_the_stream() -> None:
    reader = EventReader()
    event = b"data: " + b"x" * 2**19 + b"\n\n"
    assert sum(len(reader.push(event)) for _ in range(8)) == 8


def record_of(*timed: tuple[float, Any], is_chat: bool = False) -> StreamRecord:
    record = StreamRecord(is_chat=is_chat)
    for at_s, value in timed:
        record.add(value if isinstance(value, bytes) else json.dumps(value).encode(), at_s)
    return record


def test_a_completion_with_several_tokens_in_a_chunk() -> None:
    result = record_of(
        (0.5, token("a")), (0.75, token("bc")), (1.75, token("", "length")), (9.0, usage(7, 4)), (9.0, b"[DONE]")
    ).result(3.0)
    assert result.start_s == 3.0
    assert result.ttft_s == 0.5
    assert result.itl_s == (0.25, 1.0)
    assert result.latency_s == 1.75, "the last chunk with tokens ends it, not the usage"
    assert (result.input_tokens, result.output_tokens) == (7, 4), "the server's count, not the chunks'"
    assert result.tpot_s == pytest.approx(1.25 / 3)
    assert result.text == "abc"
    assert result.is_complete


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def test_a_chats_greeting_and_end_are_no_tokens() -> None:
    result = record_of(
        (0.1, delta(role="assistant", content="")),
        (0.5, delta(content="a")),
        (0.75, delta(content="b")),
        (2.0, delta("stop")),
        (2.0, usage(7, 3)),
        (2.0, b"[DONE]"),
        is_chat=True,
    ).result(0.0)
    assert (result.ttft_s, result.itl_s, result.latency_s, result.text) == (0.5, (0.25,), 0.75, "ab")


def test_a_chat_of_one_silent_token_has_its_end_as_first_token() -> None:
    timed = (0.1, delta(role="assistant", content="")), (0.5, delta("stop")), (0.5, usage(7, 1)), (0.5, b"[DONE]")
    result = record_of(*timed, is_chat=True).result(0.0)
    assert (result.ttft_s, result.latency_s, result.tpot_s) == (0.5, 0.5, None)


def test_a_running_usage_is_the_last_one() -> None:
    chunks = [{**token("x"), "usage": usage(5, count)["usage"]} for count in (1, 2)]
    result = record_of((0.1, chunks[0]), (0.2, chunks[1]), (0.2, b"[DONE]")).result(0.0)
    assert (result.input_tokens, result.output_tokens) == (5, 2)


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (b"{not json", "bad_stream: an event is not JSON: b'{not json'"),
        (b"\xff\xfe", "bad_stream: an event is not JSON"),
        (b"[" * 100_000, "bad_stream: an event is not JSON"),
        (b"[1]", "bad_stream: an event is not an object"),
        ({"choices": 5}, "bad_stream: a chunk's choices are not"),
        ({"choices": ["x"]}, "bad_stream: a chunk's choices are not"),
        ({"choices": {"0": 1}}, "bad_stream: a chunk's choices are not"),
        ({"usage": {"prompt_tokens": "1", "completion_tokens": 1}}, "bad_stream: the usage counts are"),
        ({"usage": {"prompt_tokens": 1, "completion_tokens": -1}}, "bad_stream: the usage counts are"),
        ({"usage": {}}, "bad_stream: the usage counts are"),
        ({"error": {"message": "the expert\nis gone"}}, "server_error: the expert is gone"),
        ({"error": "plain"}, "server_error: plain"),
    ],
)
def test_what_is_no_chunk_fails_the_request(event: Any, reason: str) -> None:
    with pytest.raises(RequestFailed) as failed:
        record_of((0.1, event))
    assert str(failed.value).startswith(reason)


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([token("a"), usage(1, 1)], r"bad_stream: the stream ended before \[DONE\]"),
        ([usage(1, 0), b"[DONE]"], "no_tokens"),
        ([token("a"), b"[DONE]"], "no_usage"),
    ],
)
def test_an_answer_without_its_end_its_tokens_or_its_usage_is_not_one(events: list[Any], reason: str) -> None:
    record = record_of(*((0.1, event) for event in events))
    with pytest.raises(RequestFailed, match=reason):
        record.result(0.0)


@pytest.mark.parametrize("odd", [{"choices": [{"text": 5}]}, {"choices": [{}]}, {"choices": None}, {"id": "x"}])
def test_odd_chunks_do_no_harm(odd: Any) -> None:
    result = record_of((0.1, odd), (0.2, token("a")), (0.2, usage(1, 1)), (0.2, b"[DONE]")).result(0.0)
    assert result.text == "a"
