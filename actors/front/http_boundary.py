"""The outermost ASGI layer: counts requests, bounds how many are served at once, and lets no exception out.

Routes and their errors are `actors.front.http_app`'s work; what reaches this file as an exception is either a
client that left or a defect, which is logged and answered with 500.
"""

import asyncio
import logging
from collections.abc import Mapping

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.front.front_door import FrontDoor
from actors.front.openai_errors import internal, overloaded
from actors.front.streaming import ClientGone

LOG = logging.getLogger(__name__)

OTHER = "other"


class Boundary:
    """`endpoints` names the paths that have series of their own; True for those that are bounded."""

    def __init__(self, app: ASGIApp, *, front: FrontDoor, endpoints: Mapping[str, bool]) -> None:
        self._app = app
        self._front = front
        self._endpoints = endpoints
        self._inflight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        path = str(scope["path"])
        try:
            if self._endpoints.get(path):
                await self._bounded(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        except (ClientGone, ClientDisconnect):
            self._front.metrics.disconnects.inc()
        except asyncio.CancelledError:  # Ray Serve's word for the same
            self._front.metrics.disconnects.inc()
            raise
        except Exception:
            LOG.exception("unexpected error at %s", path if path in self._endpoints else OTHER)
            self._front.metrics.unexpected.inc()
            if answer.status is None:
                await internal().response()(scope, receive, answer)
        finally:
            endpoint = path if path in self._endpoints else OTHER
            self._front.metrics.requests.labels(endpoint, str(answer.status or 499)).inc()

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._inflight >= self._front.limits.max_requests:
            await overloaded().response()(scope, receive, send)
            return
        self._inflight += 1
        self._front.metrics.inflight.set(self._inflight)
        try:
            await self._app(scope, receive, send)
        finally:
            self._inflight -= 1
            self._front.metrics.inflight.set(self._inflight)


class _Answer:
    """Passes messages on and remembers the status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
