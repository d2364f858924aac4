"""The client of the HTTP campaign: what counts as an answer, as silence, and as a golden stream that said the same."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.fuzz import http_client
from tests.fuzz.http_client import Client
from tests.fuzz.http_golden import Golden, _said
from tests.fuzz.http_requests import Asked, request

pytestmark = pytest.mark.anyio
GOOD = Asked(request("POST", "/", b"{}", keep=True), True)
Answers = Callable[[int], bytes | None]
"""What is answered to each request, counted over all connections; None: the connection is closed instead."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def serving(answers: Answers) -> AsyncIterator[tuple[int, list[int]]]:
    """A server's port, and how many requests each of its connections had."""
    connections: list[int] = []
    handlers: list[Any] = []
    total = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal total
        handlers.append(asyncio.current_task())
        mine = len(connections)
        connections.append(0)
        while await _request_of(reader):
            answer = answers(total)
            total += 1
            connections[mine] += 1
            if answer is None:
                break
            writer.write(answer)
            if b"Connection: close" in answer:
                break
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], connections
        await asyncio.gather(*handlers)


async def _request_of(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(1 << 16)
    except ConnectionError:
        return b""


async def accepted(connections: list[int], num: int) -> None:
    while len(connections) < num:  # noqa: ASYNC110 - a socket that is accepted tells nobody
        await asyncio.sleep(0)


def plain(body: bytes, status: int = 200, more: str = "") -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


async def test_whole_requests_share_a_connection() -> None:
    chunked = b"HTTP/1.1 400 X\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    async with serving(lambda n: chunked if n else plain(b"first")) as (port, connections):
        client = Client("127.0.0.1", port)
        first, second = await client.send(GOOD), await client.send(GOOD)
        client.close()
    assert (first.status, first.body, first.silent) == (200, b"first", False)
    assert (second.status, second.body, second.silent) == (400, b"abcde", False)
    assert connections == [2]


async def test_a_connection_that_was_ended_in_between_is_no_silence() -> None:
    async with serving(lambda n: None if n == 1 else plain(b"x")) as (port, connections):
        client = Client("127.0.0.1", port)
        answers = [await client.send(GOOD) for _ in range(2)]
        client.close()
    assert [answer.status for answer in answers] == [200, 200]
    assert connections == [2, 1]


@pytest.mark.parametrize("nothing", [None, b"nonsense\r\n\r\n", b"HTTP/1.1 x\r\n\r\n"], ids=repr)
async def test_a_new_connection_without_an_answer_is_silence(nothing: bytes | None) -> None:
    async with serving(lambda _: nothing) as (port, connections):
        client = Client("127.0.0.1", port)
        answer = await client.send(GOOD)
        assert (await client.send(Asked(GOOD.data, False, leave_after=0))).silent is False
        await accepted(connections, 2)  # who left at once may be gone before the server has seen it
    assert (answer.status, answer.silent) == (0, True)
    assert connections[0] == 1


async def test_what_is_no_request_goes_over_a_connection_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "BROKEN_S", 60.0)  # however slow this machine is, the other side ends it
    last = "Connection: close\r\n"
    async with serving(lambda n: plain(b"x", more=last if n == 1 else "")) as (port, connections):
        client = Client("127.0.0.1", port)
        await client.send(GOOD)
        assert (await client.send(Asked(b"noise\r\n\r\n", False))).status == 200
        await client.send(GOOD)
        client.close()
    assert connections == [2, 1]


async def test_what_is_no_request_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "BROKEN_S", 0.05)
    async with serving(lambda n: b"") as (port, connections):
        answer = await Client("127.0.0.1", port).send(Asked(b"noise\r\n\r\n", False))
        await accepted(connections, 1)
    assert (answer.status, answer.silent) == (0, False)


def events(*events: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def test_a_golden_stream_says_the_same_in_one_event_or_in_three() -> None:
    def part(text: str, logprobs: list[float], end: str | None) -> dict[str, Any]:
        return {"choices": [{"text": text, "logprobs": {"token_logprobs": logprobs}, "finish_reason": end}]}

    once = _said(events(part("abc", [-1.0, -2.0, -3.0], "length")))
    assert once == ["abc", [-1.0, -2.0, -3.0], "length"]
    assert _said(events(part("a", [-1.0], None), part("bc", [-2.0, -3.0], None), part("", [], "length"))) == once
    assert _said(events(part("abc", [-1.0, -2.0, -3.5], "length"))) != once
    assert _said(events(part("abc", [-1.0, -2.0, -3.0], "length"))[:-14])[0] == "the stream was cut"
    assert _said(events({"error": {"message": "no"}}))[0] == {"error": {"message": "no"}}
    chat = {"delta": {"content": "abc"}, "finish_reason": "length"}
    chat["logprobs"] = {"content": [{"logprob": -1.0}, {"logprob": -2.0}, {"logprob": -3.0}]}
    assert _said(events({"choices": [chat]})) == once


async def test_a_golden_that_changes_is_counted() -> None:
    stopping, shown = asyncio.Event(), []

    class Report:
        golden_streams = golden_wrong = golden_refused = 0

        def show(self, text: str) -> None:
            shown.append(text)
            stopping.set()

    def said(text: str) -> bytes:
        return plain(events({"choices": [{"text": text, "logprobs": None, "finish_reason": "length"}]}))

    told = [said("a"), None, said("a"), plain(b"", 429), said("a"), said("b")]  # None: an idle connection is ended
    async with serving(lambda n: told[n]) as (port, _):
        golden, report = Golden("127.0.0.1", port, 0), Report()
        expected = await golden.ask()
        async with asyncio.timeout(60):
            await golden.keep_asking(expected, stopping, report)
        golden.close()
    assert (report.golden_streams, report.golden_refused, report.golden_wrong) == (3, 1, 1)
    assert "expected ['a'" in shown[0]
