"""The benchmark against real servers: the front door of this project, and servers that misbehave byte by byte."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from actors.front.http_app import create_app
from experiments.serving.bench import bench_serve
from experiments.serving.settings import BenchError, ServeSettings
from model.text.detokenizer import IncrementalDetokenizer
from model.text.tokenizer import load_tokenizer
from protos.coordinator_pb2 import Submit
from protos.expert_pb2 import STATUS_INTERNAL
from tests.support.front import VOCAB, make_front, run, serving
from tests.support.raw_http import (
    STREAM_HEAD,
    Answer,
    Posted,
    answers_fully,
    event,
    full_answer,
    piece,
    raw_server,
    reset,
    stream,
    token,
    usage,
    whole,
)
from tests.support.scripted_coordinator import Event, ScriptedCoordinator, failing, saying
from tests.support.tokenizers import EOS_ID, write_byte_tokenizer

SAID = "Hello, 世界! 😀 and so on"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path, VOCAB)
    return path


class Told:
    """What a benchmark said: JSON lines, and text for people."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.said: list[str] = []

    async def bench(self, url: str, **changes: Any) -> dict[str, Any]:
        settings = ServeSettings(url=url, **{"num_prompts": 4, "output_len": 5, "vocab_size": VOCAB, **changes})
        return await bench_serve(settings, tell=lambda line: self.lines.append(json.loads(line)), say=self.said.append)


def against(answer: Answer, models: str | None = None, **changes: Any) -> Told:
    """Runs a benchmark against a server that answers so."""
    told = Told()
    with raw_server(answer, models) as url:
        run(told.bench(url, **changes))
    return told


def test_our_front_door_with_random_token_ids(model_dir: Path) -> None:
    ids = load_tokenizer(model_dir).encode(SAID, add_bos=False)
    coordinator = ScriptedCoordinator(saying(ids, EOS_ID))
    told = Told()

    async def work() -> None:
        async with serving(create_app(make_front(model_dir, coordinator))) as url:
            await told.bench(url, num_prompts=6, input_len=9, repeats=2, num_warmups=2, detailed=True)

    run(work())
    assert len(coordinator.submits) == 1 + 2 + 2 * 6
    assert all(len(submit.prompt_token_ids) == 9 and submit.ignore_eos for submit in coordinator.submits)
    assert len({tuple(submit.prompt_token_ids) for submit in coordinator.submits}) == 15, "no prompt twice"
    first, second, last = told.lines
    for repeat, line in enumerate((first, second), start=1):
        assert line["repeat"] == repeat
        assert (line["completed"], line["failed"]) == (6, 0)
        assert (line["total_input_tokens"], line["total_output_tokens"]) == (54, 30)
        assert line["input_lens"] == [9] * 6
        assert line["output_lens"] == [5] * 6
        assert line["errors"] == [""] * 6
        assert all(len(gaps) <= 4 for gaps in line["itls"])
        assert line["output_throughput"] == pytest.approx(30 / line["duration"])
        assert 0 < line["p50_ttft_ms"] <= line["p99_e2el_ms"]
    assert last["aggregate"] == "median"
    assert "repeat" not in last
    assert "itls" not in last
    assert last["total_output_tokens"] == 30
    assert "Serving Benchmark Result" in told.said[-1]


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_our_front_door_with_text(model_dir: Path, tmp_path: Path, endpoint: str) -> None:
    tokenizer = load_tokenizer(model_dir)
    ids = tokenizer.encode(SAID, add_bos=False)
    coordinator = ScriptedCoordinator(saying(ids, EOS_ID))
    path = tmp_path / "text.txt"
    path.write_text("some words to ask about, again and again. " * 20)
    told = Told()

    async def work() -> None:
        async with serving(create_app(make_front(model_dir, coordinator))) as url:
            changes = {"dataset": "text", "text_path": path, "input_len": 10, "output_len": 100, "detailed": True}
            await told.bench(f"{url}/v1", endpoint=endpoint, **changes)

    run(work())
    line = told.lines[0]
    assert line["generated_texts"] == [SAID] * 4
    assert line["output_lens"] == [len(ids) + 1] * 4, "the server counts the end of sequence"
    sent = coordinator.submits[1:]
    assert line["input_lens"] == [len(submit.prompt_token_ids) for submit in sent]
    assert not any(submit.ignore_eos for submit in sent)
    # Half a character waits for its rest, so these tokens come in fewer chunks. The end of sequence is a chunk of a
    # completion; a chat's greeting and end are chunks of form only and close no gap.
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special=True)
    num_chunks = sum(bool(detokenizer.push([token])) for token in ids)
    assert num_chunks < len(ids)
    num_gaps = num_chunks - 1 if "chat" in endpoint else num_chunks
    assert all(len(gaps) == num_gaps for gaps in line["itls"])


def test_a_failure_in_mid_stream_of_our_front_door_is_counted(model_dir: Path) -> None:
    told = Told()
    ids = load_tokenizer(model_dir).encode("AB", add_bos=False)
    good, bad = saying(ids, EOS_ID), failing(STATUS_INTERNAL, "", after=ids)

    def third_fails(submit: Submit) -> Iterable[Event]:
        """However often it is tried: one failure alone is made good by the front door."""
        third = coordinator.submits[2] if len(coordinator.submits) > 2 else None
        return (bad if third is not None and submit.request_id == third.request_id else good)(submit)

    coordinator = ScriptedCoordinator(third_fails)

    async def work() -> None:
        async with serving(create_app(make_front(model_dir, coordinator))) as url:
            await told.bench(url)

    run(work())
    assert (told.lines[0]["completed"], told.lines[0]["failed"]) == (3, 1)
    assert told.lines[0]["failure_reasons"] == {"server_error": 1}


async def _say_429(posted: Posted, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(429, json.dumps({"error": {"message": "the queue is full"}})))


async def _say_500(posted: Posted, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(500, "<html>oops</html>" + "x" * 100_000))


async def _reset_in_mid_stream(posted: Posted, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + piece(event(token("a"))))
    await writer.drain()
    reset(writer)


async def _close_in_mid_stream(posted: Posted, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + piece(event(token("a"))))


async def _reset_at_once(posted: Posted, writer: asyncio.StreamWriter) -> None:
    reset(writer)


async def _garbage_event(posted: Posted, writer: asyncio.StreamWriter) -> None:
    writer.write(stream(token("a"), "{{{", usage(1, 1), "[DONE]"))


async def _garbage_lines(posted: Posted, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + piece("\x00\x01 what is this\n\n" * 50) + b"0\r\n\r\n")


async def _garbage_http(posted: Posted, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x00\xff\x00 no http at all\r\n\r\n")


async def _endless_event(posted: Posted, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD)
    while True:
        writer.write(piece("data: " + "x" * 2**16))
        await writer.drain()


async def _no_done(posted: Posted, writer: asyncio.StreamWriter) -> None:
    writer.write(stream(token("a"), usage(1, 1)))


async def _no_usage(posted: Posted, writer: asyncio.StreamWriter) -> None:
    writer.write(stream(token("a", "stop"), "[DONE]"))


async def _silence(posted: Posted, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def _silence_in_mid_stream(posted: Posted, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + piece(event(token("a"))))
    await asyncio.Event().wait()


FAILURES: list[tuple[Answer, str, str]] = [
    (_say_429, "http_429", "the queue is full"),
    (_say_500, "http_500", "<html>oops"),
    (_reset_in_mid_stream, "connection", ""),
    (_close_in_mid_stream, "connection", ""),
    (_reset_at_once, "connection", ""),
    (_garbage_event, "bad_stream", "an event is not JSON: b'{{{'"),
    (_garbage_lines, "bad_stream", "the stream ended before [DONE]"),
    (_garbage_http, "connection", ""),
    (_endless_event, "bad_stream", "an event has more than"),
    (_no_done, "bad_stream", "the stream ended before [DONE]"),
    (_no_usage, "no_usage", ""),
    (_silence, "timeout", "no full answer within 8 s"),
    (_silence_in_mid_stream, "timeout", "no full answer within 8 s"),
]


@pytest.mark.parametrize(("bad", "kind", "detail"), FAILURES, ids=[bad.__name__ for bad, _, _ in FAILURES])
def test_a_failed_request_is_counted_with_its_reason_and_in_no_latency(bad: Answer, kind: str, detail: str) -> None:
    """The first request is good, so that the run begins; of the next four the second goes wrong."""
    count = 0

    async def answer(posted: Posted, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        await (bad if count == 3 else answers_fully)(posted, writer)

    told = against(answer, detailed=True, max_concurrency=1, timeout_s=8.0 if kind == "timeout" else 120.0)
    line = told.lines[0]
    assert (line["completed"], line["failed"]) == (3, 1)
    assert line["failure_reasons"] == {kind: 1}
    assert [bool(error) for error in line["errors"]] == [False, True, False, False]
    assert line["errors"][1].startswith(f"{kind}: {detail}")
    assert len(line["errors"][1]) <= 300
    assert line["output_lens"] == [5, 0, 5, 5]
    assert line["total_output_tokens"] == 15
    assert line["request_throughput"] == pytest.approx(3 / line["duration"])
    if kind == "timeout":
        assert line["p99_e2el_ms"] < 8000
    assert told.lines[-1]["failed"] == 1
    assert f"Failed, {kind}:" in told.said[-1]


def test_the_cap_on_concurrency_is_reached_and_kept() -> None:
    """Answers are held until as many as allowed are in flight; with fewer in flight this would time out."""
    lock, now, most = threading.Lock(), 0, 0
    full = asyncio.Event()
    seen = 0

    async def answer(posted: Posted, writer: asyncio.StreamWriter) -> None:
        nonlocal now, most, seen
        with lock:
            seen, now = seen + 1, now + 1
            most = max(most, now)
        if seen > 1:
            if now == 3:
                full.set()
            await full.wait()
        with lock:
            now -= 1
        await answers_fully(posted, writer)

    told = against(answer, num_prompts=12, max_concurrency=3)
    assert most == 3
    assert told.lines[0]["completed"] == 12
    assert told.lines[0]["max_concurrency"] == 3
    assert told.lines[0]["max_concurrent_requests"] <= 3


def test_goodput_and_chosen_metrics_reach_the_line() -> None:
    changes = {"percentile_metrics": ("itl", "client_queue_time"), "metric_percentiles": (75.0,)}
    told = against(answers_fully, goodput=(("e2el", 60_000.0),), request_rate=400.0, burstiness=0.5, **changes)
    line = told.lines[0]
    assert line["request_goodput"] == line["request_throughput"]
    assert (line["request_rate"], line["burstiness"]) == (400.0, 0.5)
    assert {"p75_itl_ms", "mean_client_queue_time_ms"} <= set(line)
    assert "mean_ttft_ms" not in line
    assert line["client_cpu_s"] > 0


def test_several_tokens_in_a_chunk_are_one_interval_and_are_all_counted() -> None:
    async def answer(posted: Posted, writer: asyncio.StreamWriter) -> None:
        writer.write(stream(token("abc"), token("de", "length"), usage(7, 5), "[DONE]"))

    line = against(answer, detailed=True, num_prompts=1).lines[0]
    assert line["output_lens"] == [5]
    assert len(line["itls"][0]) == 1
    assert line["mean_tpot_ms"] == pytest.approx(line["itls"][0][0] * 1000 / 4)


def test_the_key_and_the_model_are_sent() -> None:
    posts: list[Posted] = []

    async def answer(posted: Posted, writer: asyncio.StreamWriter) -> None:
        posts.append(posted)
        writer.write(full_answer(posted))

    with raw_server(answer) as url:
        settings = ServeSettings(url=url, num_prompts=1, output_len=1, model="other")
        line = run(bench_serve(settings, tell=lambda _: None, say=lambda _: None, api_key="secret"))
    assert line["model_id"] == "other"
    assert {posted.body["model"] for posted in posts} == {"other"}
    assert {posted.headers["authorization"] for posted in posts} == {"Bearer secret"}
    assert {posted.path for posted in posts} == {"/v1/completions"}
    assert "secret" not in json.dumps(line)


def test_nobody_there_is_said_before_the_run() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    told = Told()
    with pytest.raises(BenchError, match=rf"^URL is http://127.0.0.1:{port}, but nothing answers there: .*$"):
        run(told.bench(f"http://127.0.0.1:{port}"))
    assert (told.lines, told.said) == ([], [])


@pytest.mark.parametrize(
    "models", ["<html>", "{}", '{"data": []}', '{"data": [{"name": 1}]}', '{"data": 5}', "[" * 9999]
)
def test_a_server_without_models_is_said_before_the_run(models: str) -> None:
    with pytest.raises(BenchError, match="/v1/models answers 200 and no list of models"):
        against(answers_fully, models)


def test_a_model_that_is_not_served_is_said_before_the_run() -> None:
    with pytest.raises(BenchError, match=r"^--model is 'nope', but the server has tiny, other$"):
        against(answers_fully, model="nope")


def test_a_prompt_that_the_server_refuses_is_said_before_the_run(model_dir: Path) -> None:
    told = Told()

    async def work() -> None:
        async with serving(create_app(make_front(model_dir, ScriptedCoordinator(saying([7]))))) as url:
            await told.bench(url, vocab_size=49_152)

    with pytest.raises(BenchError, match=r"^the first request failed, so nothing was measured: http_400: .*300"):
        run(work())
    assert told.lines == []


def test_failed_warm_ups_are_told_and_a_run_without_an_answer_fails_after_its_lines() -> None:
    count = 0

    async def answer(posted: Posted, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        await (answers_fully if count == 1 else _say_429)(posted, writer)

    told = Told()
    with (
        raw_server(answer) as url,
        pytest.raises(BenchError, match=r"^no request was answered: http_429: the queue is full"),
    ):
        run(told.bench(url, num_warmups=2, repeats=2))
    assert any(said == "warm-ups failed: {'http_429': 2}" for said in told.said)
    assert [line["failed"] for line in told.lines] == [4, 4, 4]
    assert told.lines[-1]["failure_reasons"] == {"http_429": 8}
    assert told.lines[-1]["mean_ttft_ms"] is None
