"""Asks an ingress from Serve's HTTP proxy, beside the requests, whether it would still refuse them for overload.

The question is a request like those that are refused, but without their body, and with a header that no client may
send. An ingress that would refuse it does, in the words for everybody; else it says for how many there is room. When to
ask, and what becomes of the answer, is `actors.front.proxy_hold`'s.
"""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope

LOG = logging.getLogger(__name__)

ASK_HEADER = "X-Octavo-Ask"
"""Of a question."""
ROOM_HEADER = "X-Octavo-Room"
"""Of its answer, where there is room: for how many requests. Without it the ingress refuses nobody, and cannot say."""
TOLD = 204
"""The status of that answer."""
AUTHORIZATION, ORIGIN = b"authorization", b"origin"
"""What the words of a refusal depend on."""
ASK = ASK_HEADER.lower().encode()

MAX_ANSWER_BYTES = 4096
_ROOM = ROOM_HEADER.lower().encode()
_KEPT = frozenset({AUTHORIZATION, ORIGIN, b"host"})

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Word:
    """An ingress's: `room` is for how many requests there is. With 0, `headers` and `body` are its refusal."""

    room: int
    headers: Headers
    body: bytes = b""


def question(scope: Scope) -> Scope:
    """The question for those who ask like this."""
    kept = [(name, value) for name, value in scope["headers"] if name in _KEPT]
    return {**scope, "headers": [*kept, (ASK, b"1")]}


async def ask(app: ASGIApp, scope: Scope, timeout_s: float) -> Word | None:
    """Asks a question behind `app`. None where no answer comes in time, or one of another kind."""
    answer = _Answer()
    try:
        async with asyncio.timeout(timeout_s):
            await app(scope, _Silence(), answer)
    except TimeoutError:
        return None
    except Exception:  # whatever it is, it is Serve's: then requests are to find out
        LOG.exception("an ingress could not be asked for room")
        return None
    return answer.word()


def is_question(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request's headers are a question's."""
    return any(name == ASK for name, _ in headers)


class _Answer:
    """Takes a response in."""

    def __init__(self) -> None:
        self._status = 0
        self._headers: Headers = []
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
        elif message["type"] == "http.response.body":
            self._body = (self._body + message.get("body", b""))[: MAX_ANSWER_BYTES + 1]

    def word(self) -> Word | None:
        """What it says; None where it is no answer to the question."""
        if self._status == 429 and len(self._body) <= MAX_ANSWER_BYTES:
            return Word(0, self._headers, self._body)
        told = next((value for name, value in self._headers if name.lower() == _ROOM), b"")
        return Word(int(told[:9]), self._headers) if self._status == TOLD and told.isdigit() else None


class _Silence:
    """A client that sends no body, and stays."""

    def __init__(self) -> None:
        self._sent = False

    async def __call__(self) -> Message:
        if self._sent:
            await asyncio.Event().wait()
        self._sent = True
        return {"type": "http.request", "body": b"", "more_body": False}
