"""Spans by OpenTelemetry's SDK, sent by OTLP over HTTP from a thread of the SDK's own through a bounded queue.

The only file that knows OpenTelemetry, which is an optional extra: `actors.tracing.opening` imports this file where
tracing is on, and nobody else does. What spans say is `actors.front.request_trace`'s and
`actors.coordinator.sequence_traces`' work.
"""

import threading
from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

Value = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, Value]

CLOSE_TIMEOUT_S = 2.0
"""What was not exported by then, after the last span, is lost: a dead collector must not hold up a shutdown."""

_PROPAGATOR = TraceContextTextMapPropagator()


class Span:
    """A span that has begun and is sampled. Times are in nanoseconds since 1970; without one it is now."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def traceparent(self) -> str:
        """W3C's header, by which others hang their spans under this one."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, self._context)
        return carrier["traceparent"]

    def set(self, attributes: Attributes) -> None:
        """More attributes."""
        self._span.set_attributes(attributes)

    def child(self, name: str, start_ns: int, end_ns: int, attributes: Attributes) -> None:
        """A whole span under this one."""
        child = self._tracer.start_span(name, self._context, SpanKind.INTERNAL, attributes, start_time=start_ns)
        child.end(end_ns)

    def end(self, end_ns: int | None = None, *, error: str = "") -> None:
        """Ends it, as an error of that kind where one is given."""
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(end_ns)

    @property
    def _context(self) -> Context:
        return trace.set_span_in_context(self._span, Context())


class Tracer:
    """Makes the spans of one process and sends them to `exporter`; use it from any thread.

    At most `OTEL_BSP_MAX_QUEUE_SIZE` (2,048) ended spans wait to be sent; further ones are dropped. Whether a trace is
    taken is its caller's decision where that came with the request, else that of `OTEL_TRACES_SAMPLER` (all).
    """

    def __init__(self, exporter: SpanExporter, resource: Attributes) -> None:
        # At exit nothing is waited for: the SDK would, for as long as a collector that is away takes to time out.
        self._provider = TracerProvider(resource=Resource.create(resource), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("octavo")

    @classmethod
    def to(cls, endpoint: str | None, resource: Attributes) -> "Tracer":
        """One that sends to the collector with that base URL; None leaves it to the standard variables."""
        return cls(OTLPSpanExporter(endpoint=None if endpoint is None else _traces_url(endpoint)), resource)

    def server_span(
        self, name: str, headers: Mapping[str, str], attributes: Attributes, start_ns: int | None = None
    ) -> Span | None:
        """The span of a request, under its caller's where `headers` have a `traceparent`; None where none is wanted.

        A `traceparent` that is not one is ignored, as W3C asks.
        """
        parent = _PROPAGATOR.extract(headers, Context())
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes, start_time=start_ns)
        return Span(self._tracer, span) if span.is_recording() else None

    def flush(self) -> None:
        """Waits until all that has ended is sent, or was given up."""
        self._provider.force_flush()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Sends what has ended, but does not wait longer than that for a collector."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracer close", daemon=True)
        closing.start()
        closing.join(timeout_s)


def _traces_url(endpoint: str) -> str:
    base = endpoint.rstrip("/")
    return base if base.endswith("/v1/traces") else f"{base}/v1/traces"
