"""The routes of the window: a page, the files that it consists of, and its stream of snapshots.

The page itself holds no data: all that it shows comes by `/dashboard/events`, which it reads with `fetch`, so that it
can send a key where the server has them. Nothing is loaded from elsewhere, and the page runs nothing but its own files.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from fastapi import FastAPI, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from actors.front.front_door import FrontDoor
from actors.front.openai_errors import ApiError
from actors.front.streaming import ClientGone, unless_gone
from actors.window.broadcast import Broadcast, TooManyViewers
from actors.window.front_view import FrontView

STATIC = Path(__file__).parent / "static"
PAGE = "index.html"
TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
FULL_RETRY_AFTER_S = 15.0

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_window(app: FastAPI, front: FrontDoor) -> None:
    """`/dashboard`, its files, and `/dashboard/events`."""
    view = FrontView(front)
    files = {path.name: path.read_bytes() for path in STATIC.iterdir() if path.suffix in TYPES}
    page = (STATIC / PAGE).read_bytes()

    @app.get("/dashboard", include_in_schema=False)
    async def dashboard() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=HEADERS)

    @app.get("/dashboard/events", include_in_schema=False)
    async def events() -> Response:
        return Watching(view.broadcast)

    @app.get("/dashboard/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return Response(files[name], media_type=TYPES[Path(name).suffix], headers=HEADERS)


def too_many_viewers(most: int) -> ApiError:
    """429: every place at the window is taken."""
    return ApiError(
        429,
        f"This server's dashboard is open {most} times, which is its limit. Close a page, or retry later.",
        type="rate_limit_error",
        code="too_many_viewers",
        retry_after_s=FULL_RETRY_AFTER_S,
    )


class Watching(Response):
    """Sends frames until the client leaves or the stream ends; refuses when all places are taken."""

    media_type = "text/event-stream"

    def __init__(self, broadcast: Broadcast) -> None:
        super().__init__(headers={**HEADERS, "Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._broadcast = broadcast

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call. A page that is closed is nothing to count."""
        frames = self._broadcast.frames()
        try:
            async with aclosing(frames):
                await unless_gone(receive, self._run(scope, receive, send, frames))
        except (ClientGone, OSError):
            return

    async def _run(self, scope: Scope, receive: Receive, send: Send, frames: AsyncGenerator[bytes, None]) -> None:
        try:
            first = await anext(frames, b"")
        except TooManyViewers:
            await too_many_viewers(self._broadcast.max_viewers).response()(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        async for frame in frames:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
