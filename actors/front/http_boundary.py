"""The outermost ASGI layer: counts requests and lets no exception out. And the innermost: bounds how many generate.

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
from actors.front.proxy_ask import is_question
from actors.front.proxy_hold import refused_at_proxy
from actors.front.request_ids import id_of
from actors.front.streaming import ClientGone

LOG = logging.getLogger(__name__)

OTHER = "other"


class Boundary:
    """`endpoints` names the paths that have series of their own."""

    def __init__(self, app: ASGIApp, *, front: FrontDoor, endpoints: Mapping[str, bool]) -> None:
        self._app = app
        self._front = front
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        path = str(scope["path"])
        if self._front.is_guarded:
            self._count_refused(scope)
        try:
            await self._app(scope, _Asked(receive), answer)
        except (ClientGone, ClientDisconnect):
            self._front.metrics.disconnects.inc()
        except asyncio.CancelledError:  # Ray Serve's word for the same
            self._front.metrics.disconnects.inc()
            raise
        except Exception:
            where = path if path in self._endpoints else OTHER
            LOG.exception("unexpected error at %s, request %s", where, id_of(scope))
            self._front.metrics.unexpected.inc()
            if answer.status is None:
                await internal().response()(scope, receive, answer)
        finally:
            if not (self._front.is_guarded and is_question(scope["headers"])):
                endpoint = path if path in self._endpoints else OTHER
                self._front.metrics.requests.labels(endpoint, str(answer.status or 499)).inc()

    def _count_refused(self, scope: Scope) -> None:
        """What the proxy has refused in our name."""
        for path, count in refused_at_proxy(scope["headers"]):
            endpoint = path if path in self._endpoints else OTHER
            self._front.metrics.requests.labels(endpoint, "429").inc(count)


class Bound:
    """At most `max_requests` at one time, of those at the `endpoints` that are True."""

    def __init__(self, app: ASGIApp, *, front: FrontDoor, endpoints: Mapping[str, bool]) -> None:
        self._app = app
        self._front = front
        self._endpoints = endpoints
        self._inflight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if scope["type"] != "http" or not self._endpoints.get(str(scope["path"])):
            await self._app(scope, receive, send)
            return
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


class _Asked:
    """Passes messages on. A server that raises instead has lost the client, as Ray Serve does before the body's end."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive

    async def __call__(self) -> Message:
        try:
            return await self._receive()
        except ClientDisconnect:
            raise
        except Exception as error:
            raise ClientDisconnect from error


class _Answer:
    """Passes messages on and remembers the status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
