"""What a coordinator tells of traced requests, through a real engine and the real SDK, with spans kept in memory."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from actors.coordinator.sequence_traces import SPAN, ExpertTotals, SequenceTraces
from actors.tracing.tracer import Tracer
from cluster.sequence import FinishReason
from tests.support.checkpoints import write_mixtral
from tests.support.engines import GatedExperts, Stories, TinyModel, make_engine, request, running, tell
from tests.support.front import run

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = f"00-{TRACE_ID}-{PARENT_ID}-01"
PROMPT = list(range(10, 50))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path: Path = tmp_path_factory.mktemp("traced")
    write_mixtral(path)
    return TinyModel.load(path)


class Kept:
    """A tracer whose spans stay here."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracer = Tracer(self.exporter, {"service.name": "test"})
        self.looks = itertools.count()

    def traces(self, **changes: Any) -> SequenceTraces:
        """A look at the totals finds one message and 0.25 s more than the look before."""
        return SequenceTraces(self.tracer, model="tiny", totals=self._totals, **changes)

    def spans(self) -> list[ReadableSpan]:
        self.tracer.flush()
        return list(self.exporter.get_finished_spans())

    def one(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.spans() if span.name == name]
        return found

    def _totals(self) -> ExpertTotals:
        look = next(self.looks)
        return ExpertTotals(messages=look, wait_s=look / 4, compute_s=look / 8)


@pytest.fixture
def kept() -> Iterator[Kept]:
    one = Kept()
    yield one
    one.tracer.close()


def in_engine(model: TinyModel, traces: SequenceTraces, use: Callable[..., Any], **settings: Any) -> None:
    async def work() -> None:
        stories = Stories()
        engine = make_engine(model, stories, traces=traces, **settings)
        async with running(engine):
            await use(engine, stories)

    run(work())


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_request_is_a_span_with_its_phases(model: TinyModel, kept: Kept) -> None:
    async def use(engine: Any, stories: Stories) -> None:
        traced = request(PROMPT, 6, traceparent=CALLER)
        await tell(engine, stories, [traced, request(PROMPT[:5], 6)])

    in_engine(model, kept.traces(), use, chunk=16)
    assert sorted(span.name for span in kept.spans()) == ["decode", SPAN, "prefill", "queue"]
    whole, queue, prefill, decode = (kept.one(name) for name in (SPAN, "queue", "prefill", "decode"))
    assert whole.parent is not None
    assert f"{whole.parent.span_id:016x}" == PARENT_ID
    assert {f"{span.context.trace_id:032x}" for span in kept.spans() if span.context} == {TRACE_ID}
    assert whole.context is not None
    assert {part.parent.span_id for part in (queue, prefill, decode) if part.parent} == {whole.context.span_id}
    times = [whole.start_time, queue.start_time, queue.end_time, prefill.start_time, prefill.end_time]
    times += [decode.start_time, decode.end_time, whole.end_time]
    known = [at for at in times if at is not None]
    assert len(known) == 8
    assert known == sorted(known)
    assert (whole.start_time, queue.end_time, prefill.end_time) == (
        queue.start_time,
        prefill.start_time,
        decode.start_time,
    )
    said = attributes(whole)
    assert said["gen_ai.usage.input_tokens"] == len(PROMPT)
    assert said["gen_ai.usage.output_tokens"] == 6
    assert said["gen_ai.response.finish_reasons"] == ("length",)
    assert said["gen_ai.response.model"] == "tiny"
    assert 0 < said["gen_ai.latency.time_to_first_token"] <= said["gen_ai.latency.e2e"]
    assert said["gen_ai.latency.time_in_queue"] >= 0
    parts = attributes(prefill), attributes(decode)
    assert [part["octavo.steps"] for part in parts] == [3, 5], "40 tokens by 16; then 5 after the first"
    assert [part["octavo.expert.messages"] for part in parts] == [3, 5]
    assert [part["octavo.expert.wait_s"] for part in parts] == [0.75, 1.25]
    assert [part["octavo.expert.compute_s"] for part in parts] == [0.375, 0.625]


def test_nothing_is_noted_of_who_is_not_traced(model: TinyModel, kept: Kept) -> None:
    async def use(engine: Any, stories: Stories) -> None:
        await tell(engine, stories, [request(PROMPT, 6)])

    in_engine(model, kept.traces(), use)
    assert kept.spans() == []
    assert next(kept.looks) == 0


def test_no_token_depends_on_a_trace(model: TinyModel, kept: Kept) -> None:
    told = []

    async def use(engine: Any, stories: Stories) -> None:
        for parent in ("", CALLER):
            (story,) = await tell(engine, stories, [request(PROMPT, 8, num_logprobs=2, traceparent=parent)])
            told.append(story.exact)

    in_engine(model, kept.traces(), use)
    assert told[0] == told[1]


def test_who_is_cancelled_in_the_queue_was_only_there(model: TinyModel, kept: Kept) -> None:
    async def use(engine: Any, stories: Stories) -> None:
        seq_id = engine.submit(request(PROMPT, 6, traceparent=CALLER))
        assert engine.cancel(seq_id)
        assert stories.of(seq_id).finish_reason is FinishReason.CANCELLED

    in_engine(model, kept.traces(), use)
    assert sorted(span.name for span in kept.spans()) == [SPAN, "queue"]
    assert attributes(kept.one(SPAN))["gen_ai.response.finish_reasons"] == ("cancelled",)
    assert attributes(kept.one(SPAN))["gen_ai.usage.output_tokens"] == 0


def test_a_request_whose_time_is_up_is_an_error(model: TinyModel, kept: Kept) -> None:
    gated = GatedExperts(model.experts)
    gated.gate.clear()

    async def use(engine: Any, stories: Stories) -> None:
        story = stories.of(engine.submit(request(PROMPT, 6, traceparent=CALLER, deadline_s=engine.now() + 0.2)))
        async with asyncio.timeout(120):
            await story.done.wait()

    in_engine(model, kept.traces(), use, experts=gated)
    whole = kept.one(SPAN)
    assert not whole.status.is_ok
    assert attributes(whole)["error.type"] == "status_5"
    assert attributes(whole)["gen_ai.response.finish_reasons"] == ("expired",)


def test_who_goes_on_from_elsewhere_says_so(model: TinyModel, kept: Kept) -> None:
    async def use(engine: Any, stories: Stories) -> None:
        (first,) = await tell(engine, stories, [request(PROMPT, 6)])
        rest = request(PROMPT, 6, generated_ids=tuple(first.tokens[:4]), traceparent=CALLER)
        (again,) = await tell(engine, stories, [rest])
        assert again.tokens == first.tokens[4:]

    in_engine(model, kept.traces(), use)
    said = attributes(kept.one(SPAN))
    assert (said["octavo.tokens_from_elsewhere"], said["gen_ai.usage.output_tokens"]) == (4, 2)


def test_a_tracer_that_breaks_ends_no_request(model: TinyModel) -> None:
    class Broken:
        def server_span(self, *_: Any) -> None:
            raise RuntimeError("no spans today")

    async def use(engine: Any, stories: Stories) -> None:
        told = await tell(engine, stories, [request(PROMPT, 6, traceparent=CALLER), request(PROMPT, 6)])
        assert [len(story.tokens) for story in told] == [6, 6]

    in_engine(model, SequenceTraces(Broken()), use)
