"""The HTTP routes of one front door as a FastAPI application, for any ASGI server. It knows nothing of Ray."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from actors.front.chat_completions import ChatCompletion
from actors.front.completions import Completion
from actors.front.front_door import FrontDoor
from actors.front.http_boundary import Boundary
from actors.front.openai_errors import ApiError, model_not_found, not_ready
from actors.front.openai_schema import ChatCompletionRequest, CompletionRequest
from actors.front.request_body import read_request
from actors.front.streaming import EventStream, unless_gone

# Every path with metrics of its own; True for those that generate.
ENDPOINTS = {
    "/v1/completions": True,
    "/v1/chat/completions": True,
    "/v1/models": False,
    "/health": False,
    "/metrics": False,
}


def create_app(front: FrontDoor) -> FastAPI:
    """The application. Its lifespan connects to the coordinators and closes the front door at the end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await front.coordinators.connect()
        yield
        await front.close()

    app = FastAPI(title="Octavo", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(Boundary, front=front, endpoints=ENDPOINTS)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    _add_generation(app, front)
    _add_models(app, front)
    _add_observation(app, front)
    return app


def _add_generation(app: FastAPI, front: FrontDoor) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = await read_request(request, CompletionRequest, front.limits)
        work = await unless_gone(request.receive, Completion.prepare(front, asked))
        return await _answer(front, request, work, stream=bool(asked.stream))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = await read_request(request, ChatCompletionRequest, front.limits)
        work = await unless_gone(request.receive, ChatCompletion.prepare(front, asked))
        return await _answer(front, request, work, stream=bool(asked.stream))


async def _answer(front: FrontDoor, request: Request, work: Completion | ChatCompletion, *, stream: bool) -> Response:
    if stream:
        return EventStream(
            work.chunks(),
            on_error=lambda error: front.metrics.broken_streams.labels(error.code or "none").inc(),
        )
    return JSONResponse(await unless_gone(request.receive, work.body()))


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


def _add_observation(app: FastAPI, front: FrontDoor) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        if not await front.coordinators.is_ready():
            raise not_ready()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        await front.coordinators.snapshots()
        return Response(front.metrics.render(), media_type=CONTENT_TYPE_LATEST)


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
