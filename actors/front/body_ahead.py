"""Takes a small request body along with its head, from Serve's HTTP proxy to the ingress.

Serve sends an ingress the head alone, and the ingress calls the proxy back for the body: two messages through Ray
before a request can be read. A body that has come with its head, as most do, needs neither: it travels in the ASGI
scope, which only servers write. Whoever does not look there still gets it by `receive`. How long a body that comes
later may take, and what may be in it, is `actors.front.request_body`'s.
"""

import asyncio
from collections import deque
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BYTES = 32 * 1024
"""Ray carries an argument within its message up to 100 KB, which is for the head too."""
WAIT_S = 0.005
"""For what a client sends in a second packet right behind its head. Nothing could be done without it meanwhile."""

_BODY = "octavo.body"


class BodyAhead:
    """An ASGI layer around Serve's proxy. `wait_s` is how long a body may be behind its head to travel with it."""

    def __init__(self, app: ASGIApp, wait_s: float = WAIT_S) -> None:
        self._app = app
        self._wait_s = wait_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if scope["type"] != "http" or not _is_small(scope["headers"]):
            await self._app(scope, receive, send)
            return
        told: deque[Message] = deque()
        body = await self._read(receive, told)
        if body is not None:
            scope = {**scope, _BODY: body}
        await self._app(scope, _Again(told, receive), send)

    async def _read(self, receive: Receive, told: deque[Message]) -> bytes | None:
        """The whole body, if it comes at once. What was received meanwhile is in `told`."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._wait_s):
                while len(body) <= MAX_BYTES:
                    message = await receive()
                    told.append(message)
                    if message["type"] != "http.request":
                        return None
                    body += message.get("body", b"")
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            pass
        return None


class _Again:
    """Says once more what was received already, then what comes."""

    def __init__(self, told: deque[Message], receive: Receive) -> None:
        self._told = told
        self._receive = receive

    async def __call__(self) -> Message:
        return self._told.popleft() if self._told else await self._receive()


def body_of(scope: Scope) -> bytes | None:
    """The body that came along with this head; None where there is none, or it must be received."""
    body: bytes | None = scope.get(_BODY)
    return body


def _is_small(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a body is announced that may travel with its head."""
    announced = b""
    for name, value in headers:
        if name == b"content-length":
            announced = value
        elif name == b"expect":  # the client sends it when asked to, and may be told that it need not
            return False
    return announced.isdigit() and 0 < int(announced[:20]) <= MAX_BYTES
