"""Every request has an id: the client's `X-Request-Id` where that is one, else a new one. Every answer says it.

Behind a proxy that gives ids and says them, as Ray Serve's does, saying them once more would make two headers of it.

The outermost ASGI layer but for the server's own. What it finds lies in the scope's state, for whoever answers or logs.
"""

import secrets
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.front.request_fields import REQUEST_ID

HEADER = "X-Request-Id"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestName:
    """What a request is called: by its client, or by us, in 24 hexadecimal digits that were drawn for it alone."""

    own: str | None = None
    drawn: str | None = None

    @classmethod
    def of(cls, scope: Scope) -> "RequestName":
        """As `RequestIds` left it; unnamed without that layer."""
        state = scope.get("state", {})
        own = state.get("own_request_id")
        return cls(own=own, drawn=None if own else state.get("request_id"))


UNNAMED = RequestName()


class RequestIds:
    """Sets `request_id`, and `own_request_id`: the same, or None where the client sent none that can be used.

    With `says_it` False the answer's header is left to the proxy.
    """

    def __init__(self, app: ASGIApp, *, says_it: bool = True) -> None:
        self._app = app
        self._says_it = says_it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get(HEADER, "")
        own = asked if REQUEST_ID.fullmatch(asked) else None
        request_id = own or secrets.token_hex(12)
        scope.setdefault("state", {}).update(request_id=request_id, own_request_id=own)

        async def send_with_id(message: Message) -> None:
            if self._says_it and message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def id_of(scope: Scope) -> str:
    """The request's id, for a log; "-" where nobody has given it one."""
    return str(scope.get("state", {}).get("request_id", "-"))
