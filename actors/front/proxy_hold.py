"""Refusals for overload in Serve's HTTP proxy: what an ingress has just refused, the proxy refuses too for a moment.

To carry a request from the proxy to an ingress and its refusal back costs many times what the refusal itself does. So
an ingress says with it, in a header that goes no further than the proxy, for how long it may speak for others: those
of the same path, key and origin, to whom the same bytes would be said. Meanwhile the proxy asks
(`actors.front.proxy_ask`) whether it still holds, beside the requests: so many as there is room for are sent on, the
others need not wait for a word. Where no answer comes in time, one request is sent on to find out; until it is refused,
which takes a moment, the others still are. If it is not refused at once, there is room, and all are sent on.

How many were refused here the ingresses learn from a header of requests that are sent on, for their metrics.
`actors.front.proxy_guard` puts `HoldingProxy` where it belongs; when there is room is not known here.
"""

import asyncio
import hashlib
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.front.proxy_ask import ASK, AUTHORIZATION, ORIGIN, Headers, Word, ask, question

HOLD_HEADER = "X-Octavo-Hold-Ms"
"""Of a refusal: for how many milliseconds it speaks for others, and who else than an ingress made it."""
REFUSED_HEADER = "X-Octavo-Refused"
"""Of a request that is sent on: how many were refused since the last one that said so, and at which path."""

REFUSER_HEADER = "X-Octavo-Refused-By"
"""Of a refusal, where that is to be told: by whom (below), and after how many milliseconds in the proxy."""
BY_PROXY, BY_INGRESS, BY_COORDINATOR = "proxy", "ingress", "coordinator"

PROBE_S = 0.1
"""Who is not refused so long after it was sent on has found room."""
STALE_S = 0.5
"""A hold that ended so long ago says nothing any more."""
ANSWER_HOLDS = 2
"""As many times as long as it may speak for others a refusal does while an ingress is asked and silent."""
MAX_HOLD_MS = 1000
MAX_HOLDS = 1024
MAX_ASKS = 4
"""At one time. Of others it is found out with requests."""
MAX_BODY_BYTES = 4096

_HOLD, _REFUSED = HOLD_HEADER.lower().encode(), REFUSED_HEADER.lower().encode()
_REFUSER = REFUSER_HEADER.lower().encode()
_REQUEST_ID, _LAST_EVENT_ID = b"x-request-id", b"last-event-id"
_WHO = (AUTHORIZATION, ORIGIN)
_SERVES_OWN = "/-/"

PRIVATE = frozenset({_HOLD, _REFUSED, _REFUSER, ASK})
"""Headers that a client may not send."""


@dataclass(slots=True)
class _Hold:
    """A refusal that speaks for others, `hold_s` at a time. `probe_s` is when one was sent on to find out whether it
    still holds; `room` may be sent on.
    """

    headers: Headers
    body: bytes
    until_s: float
    hold_s: float
    probe_s: float | None = None
    room: int = 0
    is_asked: bool = False


class HoldingProxy:
    """An ASGI layer around Serve's proxy. `clock` is in seconds and does not run backwards; `pause` waits for some.

    With `tells_refuser` a refusal says who made it, for those who look for the slow ones.
    """

    def __init__(
        self,
        app: ASGIApp,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        *,
        tells_refuser: bool = False,
    ) -> None:
        self._app = app
        self._clock = clock
        self._pause = pause
        self._tells_refuser = tells_refuser
        self._holds: OrderedDict[bytes, _Hold] = OrderedDict()
        self._refused: Counter[str] = Counter()
        self._asks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if scope["type"] != "http" or scope["path"].startswith(_SERVES_OWN):
            await self._app(scope, receive, send)
            return
        key = _key(scope)
        if key is None:
            await self._app(self._reporting(scope), receive, _Learning(send, self, None, None))
            return
        hold = self._holds.get(key)
        if hold is None or not self._speaks(hold, key):
            probed = None if hold is None or hold.probe_s is None else hold
            await self._app(self._reporting(scope), receive, _Learning(send, self, key, probed))
            return
        self._refused[scope["path"]] += 1
        self._wonder(hold, key, scope)
        headers = [*hold.headers, (_REQUEST_ID, _request_id(scope)), *self.refuser(BY_PROXY, 0.0)]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": hold.body})

    def learn(self, key: bytes, headers: Headers, body: bytes, hold_ms: int) -> None:
        """Who asks like this was refused in these words."""
        hold_s = hold_ms / 1000
        self._holds[key] = _Hold(headers, body, self._clock() + hold_s, hold_s)
        self._holds.move_to_end(key)
        while len(self._holds) > MAX_HOLDS:
            self._holds.popitem(last=False)

    def now(self) -> float:
        """The clock's."""
        return self._clock()

    def refuser(self, who: str, took_s: float) -> Headers:
        """What a refusal says of who made it: nothing, mostly."""
        return [(_REFUSER, f"{who} {took_s * 1000:.0f}".encode())] if self._tells_refuser else []

    def forget(self, key: bytes, hold: _Hold) -> None:
        """It no longer holds, unless something newer was said."""
        if self._holds.get(key) is hold:
            del self._holds[key]

    def _speaks(self, hold: _Hold, key: bytes) -> bool:
        """Whether what was said is to be said again. Else who asks is sent on: one of those for whom there is room, or
        the first to find out.
        """
        now_s = self._clock()
        if now_s < hold.until_s:
            if not hold.room:
                return True
            hold.room -= 1
            return False
        if hold.probe_s is None and now_s < hold.until_s + STALE_S:
            hold.probe_s = now_s
            return False
        if hold.probe_s is not None and now_s < hold.probe_s + PROBE_S:
            return True
        del self._holds[key]
        return False

    def _wonder(self, hold: _Hold, key: bytes, scope: Scope) -> None:
        """Somebody was refused: an ingress will be asked, before the hold has ended."""
        if hold.is_asked or hold.probe_s is not None or len(self._asks) >= MAX_ASKS:
            return
        hold.is_asked = True
        task = asyncio.create_task(self._ask(hold, key, scope))
        self._asks.add(task)
        task.add_done_callback(self._asks.discard)

    async def _ask(self, hold: _Hold, key: bytes, scope: Scope) -> None:
        await self._pause((hold.until_s - self._clock()) / 2)
        now_s = self._clock()
        if self._holds.get(key) is not hold or now_s >= hold.until_s:
            return
        answer_s = ANSWER_HOLDS * hold.hold_s
        hold.until_s = now_s + answer_s
        word = await ask(self._app, self._reporting(question(scope)), answer_s)
        hold.is_asked = False
        self._heed(word, hold)

    def _heed(self, word: Word | None, hold: _Hold) -> None:
        """What an ingress has said. Where that is nothing, the next request is sent on to find out."""
        hold_ms = None if word is None else _told(word.headers)[0]
        if word is None or hold_ms is None:
            hold.until_s = min(hold.until_s, self._clock())
            return
        hold.hold_s, hold.probe_s = hold_ms / 1000, None
        hold.until_s, hold.room = self._clock() + hold.hold_s, word.room
        if not word.room:
            hold.headers, hold.body = _for_others(word.headers), word.body

    def _reporting(self, scope: Scope) -> Scope:
        """The request with what was refused since the last one."""
        if not self._refused:
            return scope
        told = [(_REFUSED, f"{count} {path}".encode()) for path, count in self._refused.items()]
        self._refused.clear()
        return {**scope, "headers": [*scope["headers"], *told]}


class _Learning:
    """Sends a response on, without what is for the proxy alone; another answer than a refusal ends `hold`.

    Without a `key` it speaks for nobody, whatever it says.
    """

    def __init__(self, send: Send, proxy: HoldingProxy, key: bytes | None, hold: _Hold | None) -> None:
        self._send = send
        self._proxy = proxy
        self._key = key
        self._hold = hold
        self._began_s = proxy.now()
        self._hold_ms: int | None = None
        self._headers: Headers = []
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = self._start(message)
        elif self._key is not None and self._hold_ms is not None and message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if len(self._body) > MAX_BODY_BYTES:
                self._hold_ms = None
            elif not message.get("more_body", False):
                self._proxy.learn(self._key, self._headers, self._body, self._hold_ms)
        await self._send(message)

    def _start(self, message: Message) -> Message:
        if message["status"] != 429:
            if self._key is not None and self._hold is not None:
                self._proxy.forget(self._key, self._hold)
            return message
        headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
        self._hold_ms, by = _told(headers)
        self._headers = _for_others(headers)
        said = [one for one in headers if one[0].lower() != _HOLD]
        return {**message, "headers": [*said, *self._proxy.refuser(by, self._proxy.now() - self._began_s)]}


def hold_value(hold_s: float, by: str = BY_INGRESS) -> str:
    """Of `HOLD_HEADER`: a refusal that was made `by` such a one speaks for others for so long."""
    return f"{hold_s * 1000:.0f}" if by == BY_INGRESS else f"{hold_s * 1000:.0f} {by}"


def _told(headers: Headers) -> tuple[int | None, str]:
    """For how many milliseconds a refusal speaks for others, None for not at all; and by whom it was made."""
    told = [value for name, value in headers if name.lower() == _HOLD]
    number, _, by = told[0].partition(b" ") if len(told) == 1 else (b"", b"", b"")
    if not number.isdigit():
        return None, BY_INGRESS
    return min(int(number[:9]), MAX_HOLD_MS), BY_COORDINATOR if by == BY_COORDINATOR.encode() else BY_INGRESS


def _for_others(headers: Headers) -> Headers:
    """What is said to all."""
    return [one for one in headers if one[0].lower() not in (_HOLD, _REQUEST_ID)]


def refused_at_proxy(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[str, int]]:
    """Paths, and how many requests for each the proxy has refused, from a request's headers."""
    for name, value in headers:
        if name == _REFUSED:
            count, _, path = value.partition(b" ")
            if count.isdigit():
                yield path.decode("latin-1"), int(count[:9])


def _key(scope: Scope) -> bytes | None:
    """Whom a refusal speaks for; None for who is never refused like others: what reads, and what goes on."""
    if scope["method"] != "POST":
        return None
    digest = hashlib.blake2b(scope["path"].encode(), digest_size=16)
    for name, value in scope["headers"]:
        if name in _WHO:
            digest.update(b"\n%d %s:%s" % (len(value), name, value))
        elif name == _LAST_EVENT_ID:
            return None
    return digest.digest()


def _request_id(scope: Scope) -> bytes:
    own = next((value for name, value in scope["headers"] if name == _REQUEST_ID), None)
    return own or secrets.token_hex(12).encode()
