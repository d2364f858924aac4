"""Small bodies travel with their heads, when they come at once; nothing is lost or waited for when they do not."""

import asyncio
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.types import Message, Receive, Scope, Send

from actors.front.body_ahead import MAX_BYTES, BodyAhead, body_of
from actors.front.front_door import FrontLimits
from actors.front.http_app import create_app
from actors.front.proxy_guard import middlewares
from actors.front.proxy_hold import HOLD_HEADER, HoldingProxy
from tests.support.front import MODEL, make_front, run, serving
from tests.support.scripted_coordinator import ScriptedCoordinator, saying

TEXT = "/v1/completions"
LONG_S = 60.0
GONE: Message = {"type": "http.disconnect"}


def part(body: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


class Client:
    """Has said `messages`, and is silent until it says more."""

    def __init__(self, messages: Iterable[Message]) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self.asked = 0
        for message in messages:
            self.say(message)

    def say(self, message: Message) -> None:
        self._messages.put_nowait(message)

    async def __call__(self) -> Message:
        self.asked += 1
        return await self._messages.get()


class Ingress:
    """Notes what comes with the head, then receives as much as `count` messages."""

    def __init__(self, count: int, on_head: Callable[[], None] = lambda: None) -> None:
        self._count = count
        self._on_head = on_head
        self.ahead: bytes | None = None
        self.received: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.ahead = body_of(scope)
        self._on_head()
        for _ in range(self._count):
            self.received.append(await receive())


async def nowhere(message: Message) -> None:
    raise AssertionError(f"nothing is said: {message}")


def scope_of(length: int | None, *others: tuple[bytes, bytes], method: str = "POST") -> Scope:
    announced = [] if length is None else [(b"content-length", str(length).encode())]
    return {"type": "http", "method": method, "path": TEXT, "headers": [*announced, *others]}


@pytest.mark.parametrize("pieces", [(b"{}1234",), (b"{}", b"12", b"34"), (b"", b"{}1234")])
def test_a_body_that_comes_at_once_travels_with_its_head_and_is_still_received(pieces: tuple[bytes, ...]) -> None:
    async def work() -> None:
        said = [part(one, more=one is not pieces[-1]) for one in pieces]
        client, ingress = Client([*said, GONE]), Ingress(len(pieces) + 1)
        await BodyAhead(ingress, LONG_S)(scope_of(6), client, nowhere)
        assert ingress.ahead == b"{}1234"
        assert ingress.received == [*said, GONE]

    run(work())


def test_what_comes_late_is_not_waited_for_and_not_lost() -> None:
    async def work() -> None:
        first, rest = part(b"{", more=True), part(b"}")
        client = Client([first])

        def go_on() -> None:
            client.say(rest)
            client.say(GONE)

        ingress = Ingress(3, on_head=go_on)
        await BodyAhead(ingress, 0.001)(scope_of(2), client, nowhere)
        assert ingress.ahead is None
        assert ingress.received == [first, rest, GONE]

    run(work())


def test_a_client_that_leaves_is_told_of() -> None:
    async def work() -> None:
        client, ingress = Client([part(b"{", more=True), GONE]), Ingress(2)
        await BodyAhead(ingress, LONG_S)(scope_of(2), client, nowhere)
        assert ingress.ahead is None
        assert ingress.received[-1] == GONE

    run(work())


def test_more_than_was_announced_goes_by_itself() -> None:
    async def work() -> None:
        piece = b"x" * MAX_BYTES
        said = [part(piece, more=True), part(piece, more=True), part(piece)]
        client, ingress = Client(said), Ingress(3)
        await BodyAhead(ingress, LONG_S)(scope_of(MAX_BYTES), client, nowhere)
        assert ingress.ahead is None
        assert ingress.received == said
        assert client.asked == 3

    run(work())


@pytest.mark.parametrize(
    "scope",
    [
        scope_of(None, method="GET"),
        scope_of(0),
        scope_of(MAX_BYTES + 1),
        scope_of(None, (b"transfer-encoding", b"chunked")),
        scope_of(6, (b"expect", b"100-continue")),
        {**scope_of(None), "headers": [(b"content-length", b"-6")]},
        {**scope_of(None), "headers": [(b"content-length", b"9" * 4000)]},
        {**scope_of(6), "type": "websocket"},
    ],
)
def test_others_are_passed_on_untouched(scope: Scope) -> None:
    async def work() -> None:
        client = Client([])
        seen: list[tuple[Scope, Receive, Send]] = []

        async def ingress(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append((scope, receive, send))

        await BodyAhead(ingress)(scope, client, nowhere)
        assert seen == [(scope, client, nowhere)]
        assert client.asked == 0
        assert body_of(scope) is None

    run(work())


def test_who_is_refused_at_the_proxy_has_not_been_read() -> None:
    """As Serve puts the layers around its own: the last one is the outermost."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        held = [(HOLD_HEADER.encode(), b"250")]
        await send({"type": "http.response.start", "status": 429, "headers": held})
        await send({"type": "http.response.body", "body": b"{}"})

    async def work() -> None:
        said: list[Message] = []
        app: Any = refuse
        for layer in middlewares():
            still = {"clock": lambda: 0.0} if layer.cls is HoldingProxy else {}  # the hold does not end meanwhile
            app = layer.cls(app, *layer.args, **layer.kwargs, **still)

        async def send(message: Message) -> None:
            said.append(message)

        first, second = (Client([part(b"{}")]) for _ in range(2))
        await app(scope_of(2), first, send)
        await app(scope_of(2), second, send)
        assert [one["status"] for one in said if "status" in one] == [429, 429]
        assert (first.asked, second.asked) == (1, 0)

    run(work())


def ask(tmp_path: Path, body: bytes, **limits: Any) -> httpx2.Response:
    """One request to an ingress that can read no body but the one that came along."""

    async def talk() -> httpx2.Response:
        front = make_front(tmp_path, ScriptedCoordinator(saying(b"hi")), limits=FrontLimits(**limits))
        app = create_app(front)

        async def ingress(scope: Scope, receive: Receive, send: Send) -> None:
            async def deaf() -> Message:
                while (message := await receive())["type"] == "http.request":
                    pass
                return message

            await app(scope, deaf, send)

        guarded: Any = BodyAhead(ingress, LONG_S)
        async with serving(guarded) as url, httpx2.AsyncClient(base_url=url, timeout=LONG_S) as client:
            return await client.post(TEXT, content=body, headers={"Content-Type": "application/json"})

    return run(talk())


def test_an_ingress_reads_what_came_along(tmp_path: Path) -> None:
    asked = {"model": MODEL, "prompt": "a", "max_tokens": 2}
    answer = ask(tmp_path, json.dumps(asked).encode())
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 2
    stream = ask(tmp_path, json.dumps({**asked, "stream": True}).encode())
    assert stream.status_code == 200
    assert stream.text.endswith("data: [DONE]\n\n"), "the body itself is not taken for a client that left"


def test_what_came_along_is_checked_like_any_body(tmp_path: Path) -> None:
    assert ask(tmp_path, b'{"model":').status_code == 400
    assert ask(tmp_path, b'{"model":"tiny","prompt":"a"}', max_body_bytes=10).status_code == 413
