"""The span of one HTTP request that generates: begun before anything is read, ended when the last byte is out.

Its attributes follow the conventions for generative AI; texts, tokens and names of users are never among them. Spans
themselves are `actors.tracing`'s; without a tracer this layer is not there, and `current` is None.
"""

import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.front.choice_text import Delta
from actors.front.openai_schema import GenerationRequest
from protos.coordinator_pb2 import Submit

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
MAX_HEADER_CHARS = 512
_HEADERS = (b"traceparent", b"tracestate")
_CLIENT_LEFT = "client_disconnected"

Value = str | bool | int | float | list[str]


class OpenSpan(Protocol):
    """What is asked of `actors.tracing.tracer.Span`."""

    @property
    def traceparent(self) -> str:
        """W3C's header, for those whose spans go under this one."""
        ...

    def set(self, attributes: Mapping[str, Value]) -> None:
        """More attributes."""
        ...

    def end(self, end_ns: int | None = None, *, error: str = "") -> None:
        """Ends it."""
        ...


class SpanMaker(Protocol):
    """What is asked of `actors.tracing.tracer.Tracer`."""

    def server_span(self, name: str, headers: Mapping[str, str], attributes: Mapping[str, Value]) -> OpenSpan | None:
        """A span under the caller's; None where it is not wanted."""
        ...

    def close(self) -> None:
        """Sends what has ended, within a bounded time."""
        ...


class RequestTrace:
    """One traced request, filled in on its way. `failed` is the code of an error that came after the headers."""

    def __init__(self, span: OpenSpan) -> None:
        self._span = span
        self._began_s = time.perf_counter()
        self._first_s: float | None = None
        self._num_output = 0
        self._tokens: dict[int, int] = {}
        self._reasons: dict[int, str] = {}
        self.failed = ""

    def planned(
        self, request: GenerationRequest, model: str, num_prompt_tokens: int, submits: Iterable[Submit]
    ) -> None:
        """What was asked for; `submits` go out with this span's name."""
        asked = {
            "gen_ai.request.temperature": request.temperature,
            "gen_ai.request.top_p": request.top_p,
            "gen_ai.request.top_k": request.top_k,
            "gen_ai.request.seed": request.seed,
            "gen_ai.request.frequency_penalty": request.frequency_penalty,
            "gen_ai.request.presence_penalty": request.presence_penalty,
        }
        traceparent, max_tokens = self._span.traceparent, 0
        for submit in submits:
            submit.traceparent = traceparent
            max_tokens = max(max_tokens, submit.max_tokens)
        self._span.set({name: value for name, value in asked.items() if value is not None})
        self._span.set(
            {
                "gen_ai.request.model": request.model,
                "gen_ai.response.model": model,
                "gen_ai.request.max_tokens": max_tokens,
                "gen_ai.request.choice.count": request.num_choices,
                "gen_ai.request.stream": bool(request.stream),
                "gen_ai.usage.input_tokens": num_prompt_tokens,
            }
        )

    def note(self, delta: Delta) -> None:
        """A choice goes on."""
        if self._first_s is None:
            self._first_s = time.perf_counter()
        self._tokens[delta.index] = delta.num_tokens
        if delta.finish_reason is not None:
            self._reasons[delta.index] = delta.finish_reason

    def end(self, status: int | None, *, whole: bool) -> None:
        """The `whole` answer is out, or its client is gone; `status` is None where nobody got one."""
        now_s = time.perf_counter()
        said: dict[str, Value] = {"gen_ai.latency.e2e": now_s - self._began_s}
        if status is not None:
            said["http.response.status_code"] = status
        if self._first_s is not None:
            said["gen_ai.latency.time_to_first_token"] = self._first_s - self._began_s
            said["gen_ai.usage.output_tokens"] = sum(self._tokens.values())
        if self._reasons:
            said["gen_ai.response.finish_reasons"] = [self._reasons[index] for index in sorted(self._reasons)]
        self._span.set(said)
        broken = _CLIENT_LEFT if status is None or not whole else str(status) if status >= 500 else ""
        self._span.end(error=self.failed or broken)


_CURRENT: ContextVar[RequestTrace | None] = ContextVar("request_trace", default=None)


def current() -> RequestTrace | None:
    """The trace of the request that is being answered here; None where it has none."""
    return _CURRENT.get()


class Traced:
    """The ASGI layer around the whole application; only for the paths that generate."""

    def __init__(self, app: ASGIApp, *, spans: SpanMaker) -> None:
        self._app = app
        self._spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        generates = scope["type"] == "http" and scope["method"] == "POST"
        operation = OPERATIONS.get(str(scope["path"])) if generates else None
        span = None if operation is None else self._begin(scope, operation)
        if span is None:
            await self._app(scope, receive, send)
            return
        trace, status, whole = RequestTrace(span), None, False

        async def watched(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        before = _CURRENT.set(trace)
        try:
            await self._app(scope, receive, watched)
        finally:
            _CURRENT.reset(before)
            trace.end(status, whole=whole)

    def _begin(self, scope: Scope, operation: str) -> OpenSpan | None:
        path = str(scope["path"])
        headers = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in _HEADERS and len(value) <= MAX_HEADER_CHARS
        }
        attributes = {
            "http.request.method": "POST",
            "http.route": path,
            "url.scheme": str(scope.get("scheme", "http")),
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "octavo",
        }
        return self._spans.server_span(f"POST {path}", headers, attributes)
