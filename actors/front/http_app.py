"""The HTTP routes of one front door as a FastAPI application, for any ASGI server. It knows nothing of Ray."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.telemetry import TelemetryConfig
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from actors import __version__
from actors.front.accounts import LIMIT_HEADERS
from actors.front.caller import NOBODY, Caller
from actors.front.chat_completions import ChatCompletion
from actors.front.completions import Completion
from actors.front.front_door import FrontDoor
from actors.front.gate import Gate
from actors.front.http_boundary import Bound, Boundary
from actors.front.openai_errors import ApiError, model_not_found, not_ready
from actors.front.openai_schema import ChatCompletionRequest, CompletionRequest
from actors.front.openapi import openapi_document
from actors.front.proxy_ask import ROOM_HEADER, TOLD, is_question
from actors.front.proxy_hold import HOLD_HEADER, hold_value
from actors.front.request_body import read_request
from actors.front.request_ids import RequestIds, RequestName
from actors.front.request_trace import Traced
from actors.front.request_trace import current as current_trace
from actors.front.resume import HEADER
from actors.front.routes import ROUTES
from actors.front.streaming import EventStream, unless_gone
from actors.front.tokenization import detokenize, tokenize
from actors.front.tokenize_schema import DetokenizeRequest, TokenizeRequest
from actors.window.routes import add_window

# Every path with metrics of its own; True for those of which only so many are served at once.
ENDPOINTS = {route.path: route.is_bounded for route in ROUTES if "{" not in route.path} | {
    "/dashboard": False,
    "/dashboard/events": False,
}

_CORS: dict[str, Any] = {
    "allow_methods": ["GET", "POST"],
    "allow_headers": ["Authorization", "Content-Type", "Last-Event-ID", "X-Request-Id"],
    "expose_headers": ["Retry-After", "X-Request-Id", *LIMIT_HEADERS],
    "max_age": 600,
}


# FastAPI's own would tell whoever set OpenTelemetry's global providers of refused bodies, with what was in them.
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


async def _nothing() -> None:
    pass


def create_app(
    front: FrontDoor,
    background: Callable[[], Coroutine[Any, Any, None]] = _nothing,
    *,
    says_request_ids: bool = True,
) -> FastAPI:
    """The application. Its lifespan connects to the coordinators and closes the front door at the end.

    `background` runs meanwhile, and is cancelled then. `says_request_ids` is False behind a proxy that does.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await front.coordinators.connect()
        beside = asyncio.create_task(background())
        yield
        beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)
        await front.close()

    app = FastAPI(
        title="Octavo",
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        telemetry=NO_TELEMETRY,
    )
    app.add_middleware(Bound, front=front, endpoints=ENDPOINTS)
    app.add_middleware(Gate, keys=front.keys, accounts=front.accounts, wall_clock=front.wall_clock)
    if front.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=front.cors_origins, **_CORS)
    app.add_middleware(Boundary, front=front, endpoints=ENDPOINTS)
    app.add_middleware(RequestIds, says_it=says_request_ids)
    if front.spans is not None:
        app.add_middleware(Traced, spans=front.spans)  # the last one added is the outermost
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    _add_generation(app, front)
    _add_models(app, front)
    _add_tokenizer(app, front)
    _add_observation(app, front)
    _add_description(app, front)
    add_window(app, front)
    return app


def _add_generation(app: FastAPI, front: FrontDoor) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        told = _unread(front, request)
        if told is not None:
            return told
        asked = await read_request(request, CompletionRequest, front.limits)
        last_event_id, name = _admit(front, request), RequestName.of(request.scope)
        work = Completion.prepare(front, asked, last_event_id, name=name, caller=_caller(request))
        ready = await unless_gone(request.receive, work)
        return await _answer(front, request, ready, stream=bool(asked.stream))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        told = _unread(front, request)
        if told is not None:
            return told
        asked = await read_request(request, ChatCompletionRequest, front.limits)
        last_event_id, name = _admit(front, request), RequestName.of(request.scope)
        work = ChatCompletion.prepare(front, asked, last_event_id, name=name, caller=_caller(request))
        ready = await unless_gone(request.receive, work)
        return await _answer(front, request, ready, stream=bool(asked.stream))


def _unread(front: FrontDoor, request: Request) -> Response | None:
    """What a guarded proxy is answered that asks for room; None for requests, where they are not refused.

    To get a body from Serve's proxy takes as long as all the rest of a refusal. Raises ApiError 429.
    """
    if not front.is_guarded:
        return None
    room = front.overload.room(_caller(request).tenant)
    if room == 0:
        _admit(front, request)
        room = None
    if not is_question(request.scope["headers"]):
        return None
    held = {} if room is None else {ROOM_HEADER: str(room), HOLD_HEADER: hold_value(front.limits.hold_s)}
    return Response(status_code=TOLD, headers=held)


def _admit(front: FrontDoor, request: Request) -> str | None:
    """The last event that a client got of a stream that was cut; browsers say so by themselves.

    Who has had a part of an answer was promised the rest: only newcomers are refused for overload. Raises ApiError.
    """
    last_event_id = request.headers.get(HEADER) or None
    if last_event_id is None:
        caller = _caller(request)
        try:
            front.overload.check(caller.tenant)
        except ApiError as error:
            front.room_watch.wake()
            error.headers.update(front.hold(caller))
            raise
    return last_event_id


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope.get("state", {}).get("caller", NOBODY)
    return caller


async def _answer(front: FrontDoor, request: Request, work: Completion | ChatCompletion, *, stream: bool) -> Response:
    if stream:
        return EventStream(work.chunks(), on_error=lambda error: _note_broken(front, error))
    return JSONResponse(await unless_gone(request.receive, work.body()))


def _note_broken(front: FrontDoor, error: ApiError) -> None:
    front.metrics.broken_streams.labels(error.code or "none").inc()
    trace = current_trace()
    if trace is not None:
        trace.failed = error.code or str(error.status)


def _add_models(app: FastAPI, front: FrontDoor) -> None:
    card: dict[str, Any] = {
        "id": front.model_id,
        "object": "model",
        "created": front.created,
        "owned_by": "octavo",
        "max_model_len": front.max_model_len,
    }

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> JSONResponse:
        if model_id != front.model_id:
            raise model_not_found(model_id)
        return JSONResponse(card)


def _add_tokenizer(app: FastAPI, front: FrontDoor) -> None:
    @app.post("/tokenize")
    async def tokenize_(request: Request) -> JSONResponse:
        asked = await read_request(request, TokenizeRequest, front.limits)
        return JSONResponse(await tokenize(front, asked))

    @app.post("/detokenize")
    async def detokenize_(request: Request) -> JSONResponse:
        asked = await read_request(request, DetokenizeRequest, front.limits)
        return JSONResponse(await detokenize(front, asked))

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> JSONResponse:
        return JSONResponse(dict(front.tokenizer_info))


def _add_observation(app: FastAPI, front: FrontDoor) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        if not await front.coordinators.is_ready():
            raise not_ready()
        return JSONResponse({"status": "ok"})

    app.get("/ping")(health)
    app.post("/ping")(health)

    @app.get("/metrics")
    async def metrics() -> Response:
        await front.scrape.refresh()
        return Response(front.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/load")
    async def load() -> JSONResponse:
        return JSONResponse({"server_load": front.metrics.num_inflight})

    @app.get("/version")
    async def version() -> JSONResponse:
        return JSONResponse({"version": __version__})


def _add_description(app: FastAPI, front: FrontDoor) -> None:
    @app.get("/openapi.json")
    async def openapi() -> JSONResponse:
        return JSONResponse(openapi_document(__version__, front.model_id))


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown routes and methods, in OpenAI's words."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        message = f"Invalid URL ({request.method} {request.url.path[:200]})"
        return ApiError(404, message, code="unknown_url", headers=headers).response()
    if error.status_code == 405:
        message = f"Not allowed to {request.method} on {request.url.path[:200]}."
        return ApiError(405, message, code="method_not_supported", headers=headers).response()
    return ApiError(error.status_code, str(error.detail), headers=headers).response()
