"""The ASGI layer that lets a request in: its head within bounds, a key that is known, a rate that is kept.

Every path is closed but two (`OPEN_PATHS`), those that do not exist yet included; whoever is not let in is answered
from the head alone, before a byte of the body is asked for. It tells the routes who asks as `request.state.tenant` and
`request.state.caller`. Without keys everybody is let in.

A browser cannot send a bearer token for a page that it opens, so the dashboard's page and files also take the key as
the password of HTTP Basic, which browsers ask for by themselves.
"""

import base64
import binascii
import time
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.front.accounts import Account, Accounts
from actors.front.api_keys import KeyEntry
from actors.front.caller import NOBODY, Caller, KeyHolder
from actors.front.head_limits import check_head
from actors.front.key_file import Keys
from actors.front.openai_errors import ApiError

OPEN_PATHS = frozenset({"/health", "/ping"})
"""Whether it is ready, and whether it is there: what a load balancer asks, and tells nothing about anybody."""

_READS = ("GET", "HEAD")
_PAGE, _PAGE_STREAM = "/dashboard", "/dashboard/events"
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="octavo"'}
_PAGE_CHALLENGE = {"WWW-Authenticate": 'Basic realm="octavo"'}


class Gate:
    """`keys` None is a server without. `wall_clock` is Unix seconds."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys | None,
        accounts: Accounts | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._app = app
        self._keys = keys
        self._accounts = accounts or Accounts()
        self._wall_clock = wall_clock
        self._ring = None if keys is None else keys.ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if scope["type"] == "websocket":  # there are none here
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        told = None
        try:
            check_head(scope.get("raw_path") or b"", scope.get("query_string") or b"", scope["headers"])
            account = self._account(scope)
            if account is not None:
                told = _Told(send, account, self._accounts)
            caller = self._begin(scope, account)
        except ApiError as error:
            await error.response()(scope, receive, told or send)
            return
        scope["state"] = {**scope.get("state", {}), "tenant": caller.tenant, "caller": caller}
        try:
            await self._app(scope, receive, told or send)
        finally:
            caller.end()

    def _account(self, scope: Scope) -> Account | None:
        """Of the key that was shown; None where none is needed. Raises ApiError 401."""
        if self._keys is None or (scope["path"] in OPEN_PATHS and scope["method"] in _READS):
            return None
        ring = self._keys.ring
        if ring is not self._ring:
            self._ring = ring
            self._accounts.keep(ring.entries)
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        entry = None if len(shown) != 1 else ring.find(_shown_key(shown[0], scope))
        if entry is None or entry.is_expired(self._wall_clock()):
            raise _unauthorized(entry, given=bool(shown), challenge=_PAGE_CHALLENGE if _is_page(scope) else _CHALLENGE)
        return self._accounts.of(entry)

    def _begin(self, scope: Scope, account: Account | None) -> Caller:
        """What only reads is not limited: it costs no tokens. Raises ApiError 429."""
        if account is None:
            return NOBODY
        if scope["method"] in _READS:
            return Caller(account.entry.whose)
        account.begin(self._accounts.now())
        return KeyHolder(account, self._accounts)


class _Told:
    """Sends a response with what is left of the key's limits among its headers."""

    def __init__(self, send: Send, account: Account, accounts: Accounts) -> None:
        self._send = send
        self._account = account
        self._accounts = accounts

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            limits = self._account.headers(self._accounts.now())
            if limits:
                message = {**message, "headers": [*message.get("headers", ()), *limits]}
        await self._send(message)


def _is_page(scope: Scope) -> bool:
    """What a browser opens, and not what the page asks for: that it does with a bearer token."""
    path: str = scope["path"]
    return scope["method"] in _READS and path != _PAGE_STREAM and (path == _PAGE or path.startswith(f"{_PAGE}/"))


def _shown_key(value: bytes, scope: Scope) -> str:
    """The key in an Authorization header; empty where it is of another kind."""
    scheme, _, rest = value.decode("latin-1").partition(" ")
    match scheme.lower():
        case "bearer":
            return rest.strip()
        case "basic" if scope["method"] in _READS and scope["path"].split("/")[1] == _PAGE.strip("/"):
            return _password(rest)
        case _:
            return ""


def _password(encoded: str) -> str:
    try:
        return base64.b64decode(encoded.strip(), validate=True).decode("latin-1").partition(":")[2]
    except binascii.Error:
        return ""


def _unauthorized(entry: KeyEntry | None, *, given: bool, challenge: Mapping[str, str]) -> ApiError:
    """401. The key is not repeated: what somebody mistyped may be another key of theirs."""
    if not given:
        message = "You didn't provide an API key. Send it as the header 'Authorization: Bearer YOUR_KEY'."
    elif entry is None:
        message = "Incorrect API key provided. It must be sent once, as the header 'Authorization: Bearer YOUR_KEY'."
    else:
        message = "The API key has expired."
    return ApiError(401, message, code="invalid_api_key", headers=dict(challenge))
