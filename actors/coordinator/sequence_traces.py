"""What a coordinator tells of a traced request when it has ended: how long it waited, and what its steps cost.

One span for the request, and under it `queue`, `prefill` and `decode`; never one for a token or a message. What experts
did is summed over the steps in which the request took part, whoever else was in them. Nothing is noted of requests
without a `traceparent`. Tokens and texts are never told.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from actors.coordinator.engine_io import GenerationOutput
from cluster.ids import SequenceId
from cluster.sequence import Sequence
from cluster.step_plan import ScheduledBatch

LOG = logging.getLogger(__name__)

SPAN = "llm_request"
"""As vLLM calls it."""

Value = str | bool | int | float | list[str]


class EndedSpan(Protocol):
    """What is asked of `actors.tracing.tracer.Span`."""

    def child(self, name: str, start_ns: int, end_ns: int, attributes: dict[str, Value]) -> None:
        """A whole span under this one."""
        ...

    def end(self, end_ns: int | None = None, *, error: str = "") -> None:
        """Ends it."""
        ...


class SpanMaker(Protocol):
    """What is asked of `actors.tracing.tracer.Tracer`."""

    def server_span(
        self, name: str, headers: dict[str, str], attributes: dict[str, Value], start_ns: int | None = None
    ) -> EndedSpan | None:
        """A span under the one that `headers` name; None where it is not wanted."""
        ...


@dataclass(frozen=True, slots=True)
class ExpertTotals:
    """Since start: messages to experts, those of them sent again, seconds of waiting for experts, and what they say
    of themselves, which may overlap: seconds of computing, and of rows waiting there.
    """

    messages: int = 0
    retries: int = 0
    wait_s: float = 0.0
    compute_s: float = 0.0
    queue_s: float = 0.0


@dataclass(slots=True)
class _Phase:
    """Prefill or decode of one request: its steps, and what those cost."""

    steps: int = 0
    messages: int = 0
    retries: int = 0
    wait_s: float = 0.0
    compute_s: float = 0.0
    queue_s: float = 0.0

    def add(self, before: ExpertTotals, after: ExpertTotals) -> None:
        """One more step."""
        self.steps += 1
        self.messages += after.messages - before.messages
        self.retries += after.retries - before.retries
        self.wait_s += after.wait_s - before.wait_s
        self.compute_s += after.compute_s - before.compute_s
        self.queue_s += after.queue_s - before.queue_s

    def attributes(self) -> dict[str, Value]:
        """As a span says it."""
        return {
            "octavo.steps": self.steps,
            "octavo.expert.messages": self.messages,
            "octavo.expert.retries": self.retries,
            "octavo.expert.wait_s": self.wait_s,
            "octavo.expert.compute_s": self.compute_s,
            "octavo.expert.queue_s": self.queue_s,
        }


@dataclass(slots=True)
class _Trace:
    """A traced request on its way. Times are on the engine's clock."""

    sequence: Sequence
    traceparent: str
    arrived_s: float
    num_before: int
    admitted_s: float | None = None
    first_s: float | None = None
    prefill: _Phase = field(default_factory=_Phase)
    decode: _Phase = field(default_factory=_Phase)


class SequenceTraces:
    """Of one engine. `spans` None is off. `totals` is read before and after a step of somebody who is traced."""

    def __init__(
        self,
        spans: SpanMaker | None = None,
        *,
        model: str = "",
        totals: Callable[[], ExpertTotals] = ExpertTotals,
        clock: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._spans = spans
        self._model = model
        self._totals = totals
        self._clock = clock
        self._wall_ns = wall_ns
        self._open: dict[SequenceId, _Trace] = {}
        self._before = ExpertTotals()

    def arrived(self, sequence: Sequence, traceparent: str) -> None:
        """A request was taken in."""
        if self._spans is not None and traceparent:
            self._open[sequence.seq_id] = _Trace(sequence, traceparent, self._clock(), len(sequence.output_ids))

    def begin(self) -> None:
        """A step begins."""
        if self._open:
            self._before = self._totals()

    def computed(self, batch: ScheduledBatch) -> None:
        """Its experts have answered."""
        if not self._open:
            return
        after = self._totals()
        for item in batch.items:
            trace = self._open.get(item.sequence.seq_id)
            if trace is None:
                continue
            if trace.admitted_s is None:
                trace.admitted_s = trace.sequence.admitted_s
            (trace.prefill if trace.first_s is None else trace.decode).add(self._before, after)

    def told(self, outputs: Iterable[GenerationOutput]) -> None:
        """Some of these are the first, or the last, of their requests."""
        if not self._open:
            return
        for output in outputs:
            trace = self._open.get(output.seq_id)
            if trace is None:
                continue
            if output.token_ids and trace.first_s is None:
                trace.first_s = self._clock()
            if output.finish_reason is not None:
                del self._open[output.seq_id]
                self._tell(trace, output)

    def _tell(self, trace: _Trace, last: GenerationOutput) -> None:
        """The request's spans. What goes wrong with them is nobody else's trouble."""
        try:
            self._write(trace, last, self._clock())
        except Exception:
            LOG.exception("the spans of sequence %d could not be made", last.seq_id)

    def _write(self, trace: _Trace, last: GenerationOutput, ended_s: float) -> None:
        assert self._spans is not None, "a request is traced, but by nobody"
        shift_ns = self._wall_ns() - round(self._clock() * 1e9)

        def unix_ns(when_s: float) -> int:
            return round(when_s * 1e9) + shift_ns

        parent = {"traceparent": trace.traceparent}
        attributes = self._attributes(trace, last, ended_s)
        span = self._spans.server_span(SPAN, parent, attributes, unix_ns(trace.arrived_s))
        if span is None:
            return
        admitted_s = ended_s if trace.admitted_s is None else max(trace.arrived_s, trace.admitted_s)
        first_s = ended_s if trace.first_s is None else trace.first_s
        span.child("queue", unix_ns(trace.arrived_s), unix_ns(admitted_s), {})
        if trace.admitted_s is not None:
            span.child("prefill", unix_ns(admitted_s), unix_ns(first_s), trace.prefill.attributes())
        if trace.first_s is not None:
            span.child("decode", unix_ns(first_s), unix_ns(ended_s), trace.decode.attributes())
        failure = last.failure
        span.end(unix_ns(ended_s), error="" if failure is None else f"status_{failure.status}")

    def _attributes(self, trace: _Trace, last: GenerationOutput, ended_s: float) -> dict[str, Value]:
        """By the conventions for generative AI; latencies by vLLM's names."""
        sequence = trace.sequence
        num_output = len(sequence.output_ids) - trace.num_before
        attributes: dict[str, Value] = {
            "gen_ai.provider.name": "octavo",
            "gen_ai.response.model": self._model,
            "gen_ai.request.max_tokens": sequence.max_tokens,
            "gen_ai.usage.input_tokens": sequence.num_prompt,
            "gen_ai.usage.output_tokens": num_output,
            "gen_ai.latency.e2e": ended_s - trace.arrived_s,
            "octavo.preemptions": sequence.num_preemptions,
        }
        if trace.num_before:
            attributes["octavo.tokens_from_elsewhere"] = trace.num_before
        if trace.admitted_s is not None:
            attributes["gen_ai.latency.time_in_queue"] = max(0.0, trace.admitted_s - trace.arrived_s)
        if trace.first_s is not None:
            attributes["gen_ai.latency.time_to_first_token"] = trace.first_s - trace.arrived_s
        if last.finish_reason is not None:
            attributes["gen_ai.response.finish_reasons"] = [last.finish_reason.value]
        return attributes
