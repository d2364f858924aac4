"""Real sockets that behave badly: slow heads, endless heads, clients that do not read, bodies that never end."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import uvicorn
from fastapi import Request

from actors.front import proxy_guard
from actors.front.api_keys import one_key
from actors.front.body_ahead import BodyAhead
from actors.front.bounded_http import HEAD_S, BoundedHttp
from actors.front.front_door import FrontDoor, FrontLimits
from actors.front.head_limits import MAX_HEAD_BYTES, MAX_HEADERS, MAX_URL_BYTES
from actors.front.http_app import create_app
from actors.front.key_file import Keys
from actors.front.proxy_hold import HoldingProxy
from model.text.tokenizer import load_tokenizer
from tests.support.front import MODEL, VOCAB, make_front, run, serving
from tests.support.scripted_coordinator import Script, ScriptedCoordinator, saying
from tests.support.tokenizers import EOS_ID, write_byte_tokenizer

KEY = "a-key-that-is-only-for-tests"
PAUSE_S = 1.0
BREATH_S = 5.0
"""Long beside what holds a loop up on a busy machine."""


class Hasty(BoundedHttp):
    """Waits for nobody."""

    head_s = PAUSE_S
    write_s = PAUSE_S
    max_connections = 8


class Brisk(BoundedHttp):
    """Waits as long as an honest client needs, and not much longer."""

    head_s = write_s = BREATH_S


class Patient(BoundedHttp):
    """Bounds that no test reaches."""

    head_s = write_s = 600.0


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path, VOCAB)
    return path


def front_of(model_dir: Path, script: Script | None = None, **changes: Any) -> FrontDoor:
    said = load_tokenizer(model_dir).encode("some text", add_bos=False)
    return make_front(model_dir, ScriptedCoordinator(script or saying(said, EOS_ID)), **changes)


@asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"), **options)
    try:
        yield reader, writer
    finally:
        writer.close()


def post(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def completion(**more: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "p", **more}).encode()


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    """One response with a length."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length: ")[1].split("\r\n")[0])
    return int(head.split(" ")[1]), json.loads(await reader.readexactly(length))


async def refused(url: str, *pieces: bytes) -> tuple[int, dict[str, Any]]:
    """What a connection that sends `pieces` is told; checks that it is closed then.

    Each is read before the next one leaves, and none is sent any more when it was answered: the end of a connection
    with bytes that nobody has read is a reset, which may overtake the answer.
    """
    async with connected(url) as (reader, writer):
        told = asyncio.create_task(answer(reader))
        for piece in pieces:
            if told.done():
                break
            writer.write(piece)
            await asyncio.sleep(0.001)
        status, body = await told
        assert await reader.read() == b""
        return status, body["error"]


async def status_of(url: str) -> int:
    """0 where the connection is closed without an answer."""
    async with httpx2.AsyncClient(timeout=120) as client:
        try:
            return int((await client.get(url)).status_code)
        except httpx2.TransportError:
            return 0


# ---- heads -------------------------------------------------------------------------------------------------


def test_a_head_that_comes_slowly_is_refused_and_a_silent_connection_closed(model_dir: Path) -> None:
    async def work() -> None:
        async with serving(create_app(front_of(model_dir)), Hasty) as url:
            async with connected(url) as (reader, _):
                assert await reader.read() == b"", "nothing was said by either side"
            async with connected(url) as (reader, writer):
                told = asyncio.create_task(answer(reader))
                writer.write(b"GET /health HTTP/1.1\r\n")
                for number in range(10_000):
                    if told.done():
                        break
                    writer.write(f"X-{number}: 1\r\n".encode())
                    await asyncio.sleep(PAUSE_S / 20)
                status, body = await told
                assert (status, body["error"]["code"]) == (408, "request_timeout")
                assert f"did not arrive within {PAUSE_S:g} s" in body["error"]["message"]

    run(work())


@pytest.mark.parametrize(
    ("pieces", "status", "limit"),
    [
        ([b"GET /" + b"x" * (MAX_URL_BYTES + 1)], 414, f"{MAX_URL_BYTES} bytes"),
        ([b"GET /", *[b"x" * 1000] * 20], 414, f"{MAX_URL_BYTES} bytes"),
        ([b"GET / HTTP/1.1\r\n", *[b"a: 1\r\n"] * (MAX_HEADERS + 2)], 431, f"more than {MAX_HEADERS} headers"),
        ([b"GET / HTTP/1.1\r\na: ", *[b"x" * 10_000] * 12], 431, f"{MAX_HEAD_BYTES} bytes"),
        ([b"GET / HTTP/1.1\r\n", *[b"a: " + b"x" * 1000 + b"\r\n"] * 100], 431, f"{MAX_HEAD_BYTES} bytes"),
        ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100], 400, "Invalid HTTP request"),
        ([b"GET / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"], 400, "Invalid HTTP request"),
    ],
    ids=["url", "url in pieces", "many", "one endless", "large in all", "tls", "two lengths"],
)
def test_heads_that_are_too_large_are_refused_before_they_end(
    model_dir: Path, pieces: list[bytes], status: int, limit: str
) -> None:
    async def work() -> None:
        async with serving(create_app(front_of(model_dir)), Patient) as url:
            told, error = await refused(url, *pieces)
            assert told == status
            assert limit in error["message"]
            async with httpx2.AsyncClient(timeout=120) as client:
                assert (await client.get(f"{url}/ping")).status_code == 200

    run(work())


def test_who_takes_time_between_requests_or_for_a_body_is_served(model_dir: Path) -> None:
    async def work() -> None:
        async with serving(create_app(front_of(model_dir)), Brisk) as url, connected(url) as (reader, writer):
            whole = post("/v1/completions", completion())
            for _ in range(2):
                writer.write(whole[:-10])
                await asyncio.sleep(1.1 * BREATH_S)
                writer.write(whole[-10:])
                status, body = await answer(reader)
                assert (status, body["choices"][0]["text"]) == (200, "some text")
                await asyncio.sleep(1.1 * BREATH_S)

    run(work())


def test_requests_in_one_packet_are_answered_in_order(model_dir: Path) -> None:
    async def work() -> None:
        async with serving(create_app(front_of(model_dir)), Patient) as url, connected(url) as (reader, writer):
            writer.write(
                post("/v1/completions", completion()) + post("/no/such", b"{}") + post("/v1/completions", b"{")
            )
            assert [(await answer(reader))[0] for _ in range(3)] == [200, 404, 400]

    run(work())


def test_connections_are_bounded(model_dir: Path) -> None:
    class Few(Patient):
        max_connections = 3

    async def work() -> None:
        async with serving(create_app(front_of(model_dir)), Few) as url:
            async with connected(url) as (first, held), connected(url), connected(url):
                held.write(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await answer(first))[0] == 200
                async with connected(url) as (reader, _):
                    assert await reader.read() == b"", "one more is closed at once"
            async with asyncio.timeout(120):  # places come back as soon as the others are seen to be gone
                while await status_of(f"{url}/ping") != 200:
                    pass

    run(work())


# ---- bodies ------------------------------------------------------------------------------------------------


def test_a_stranger_is_answered_from_the_head_and_may_not_go_on_sending(model_dir: Path) -> None:
    front = front_of(model_dir, keys=Keys(None, (one_key("a", KEY),)))

    async def work() -> None:
        async with serving(create_app(front), Brisk) as url, connected(url) as (reader, writer):
            writer.write(post("/v1/completions", b"{", length=10_000_000))
            assert (await answer(reader))[0] == 401
            closed = asyncio.create_task(reader.read())
            while not closed.done():
                writer.write(b" ")
                await asyncio.sleep(PAUSE_S / 20)
            await asyncio.gather(closed, return_exceptions=True)

    run(work())


def test_a_body_that_does_not_arrive_in_time_is_given_up(model_dir: Path) -> None:
    front = front_of(model_dir, limits=FrontLimits(body_timeout_s=PAUSE_S))

    async def work() -> None:
        async with serving(create_app(front), Patient) as url, connected(url) as (reader, writer):
            writer.write(post("/v1/completions", b"{", length=1000))
            told = asyncio.create_task(answer(reader))
            while not told.done():
                writer.write(b" ")
                await asyncio.sleep(PAUSE_S / 20)
            status, body = await told
            assert (status, body["error"]["type"]) == (408, "timeout_error")
        assert "octavo_http_requests_inflight 0.0" in front.metrics.render().decode()

    run(work())


# ---- clients that do not read --------------------------------------------------------------------------------


def test_a_client_that_does_not_read_is_cut_and_holds_nobody(model_dir: Path) -> None:
    """Its sequence is freed, memory stays where it was, and another stream is told to its end meanwhile."""
    produced = 0
    freed = asyncio.Event()

    def script(submit: Any) -> Any:
        nonlocal produced
        try:
            for output in saying([5] * submit.max_tokens, EOS_ID)(submit):
                produced += submit.HasField("logprobs")
                yield output
        finally:
            if submit.HasField("logprobs"):
                freed.set()

    coordinator = ScriptedCoordinator(script)
    front = make_front(model_dir, coordinator, max_model_len=1_000_000)
    me = psutil.Process()

    async def work() -> None:
        async with serving(create_app(front), Brisk) as url:
            deaf = socket.socket()
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.setblocking(False)
            host, port = url.removeprefix("http://").split(":")
            await asyncio.get_running_loop().sock_connect(deaf, (host, int(port)))
            before = me.memory_info().rss
            body = completion(max_tokens=500_000, stream=True, logprobs=20, ignore_eos=True)
            await asyncio.get_running_loop().sock_sendall(deaf, post("/v1/completions", body))
            async with httpx2.AsyncClient(timeout=120) as client:
                other = await client.post(
                    f"{url}/v1/completions", content=completion(max_tokens=300, stream=True), timeout=200
                )
            assert other.text.endswith("data: [DONE]\n\n")
            await freed.wait()
            assert me.memory_info().rss - before < 64 * 1024 * 1024
            deaf.close()

    run(work())
    (cancelled,) = coordinator.cancelled
    assert [submit.request_id for submit in coordinator.submits if submit.HasField("logprobs")] == [cancelled]
    assert produced < 50_000, "it was cut long before its end"
    assert "octavo_client_disconnects_total 1.0" in front.metrics.render().decode()


def test_a_client_that_reads_slowly_but_steadily_gets_it_all(model_dir: Path) -> None:
    front = front_of(model_dir, saying([5] * 4000, EOS_ID), max_model_len=100_000)

    async def work() -> None:
        async with serving(create_app(front), Brisk) as url, connected(url, limit=4096) as (reader, writer):
            body = completion(max_tokens=4000, stream=True, ignore_eos=True)
            writer.write(post("/v1/completions", body, "Connection: close"))
            size, last = 0, b""
            while piece := await reader.read(60_000):
                size, last = size + len(piece), (last + piece)[-100:]
                await asyncio.sleep(0.01)
            assert b"data: [DONE]" in last
            assert size > 500_000

    run(work())


# ---- Serve's proxy ---------------------------------------------------------------------------------------------


def test_the_hook_for_serves_proxy_puts_the_bounds_where_uvicorn_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So made as Serve makes it: without naming a protocol."""
    import uvicorn.protocols.http.auto as auto

    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)
    monkeypatch.setenv(proxy_guard.WRITE_VARIABLE, "7.5")
    monkeypatch.delenv(proxy_guard.TELL_VARIABLE, raising=False)
    ahead, hold = proxy_guard.middlewares()
    assert (ahead.cls, hold.cls, hold.kwargs) == (BodyAhead, HoldingProxy, {"tells_refuser": False})
    monkeypatch.setenv(proxy_guard.TELL_VARIABLE, "1")
    assert proxy_guard.middlewares()[-1].kwargs == {"tells_refuser": True}
    config = uvicorn.Config(lambda: None, factory=True, lifespan="off", log_config=None)
    config.load()
    made = config.http_protocol_class
    assert issubclass(made, BoundedHttp)
    assert (made.head_s, made.write_s) == (HEAD_S, 7.5)


def test_headers_that_only_serves_proxy_obeys_do_not_reach_it(model_dir: Path) -> None:
    app = create_app(front_of(model_dir))
    seen: list[str] = []

    @app.get("/seen")
    async def see(request: Request) -> int:
        seen.extend(f"{name}: {value}" for name, value in request.headers.items() if name.startswith(("x-", "serve")))
        return 0

    async def work() -> None:
        async with serving(app, proxy_guard.ProxyHttp) as url, connected(url) as (reader, writer):
            writer.write(
                b"GET /seen HTTP/1.1\r\nHost: x\r\nX-Request-Disconnect-Disabled: ?1\r\n"
                b"X-Request-Timeout-Seconds: 0\r\nserve_multiplexed_model_id: \xff\r\nX-Session-Id: \xff\r\n"
                b"X-Other: 1\r\nX-Request-Id: \xff\xfe\r\n\r\n"
                b"GET /seen HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine-1\r\n\r\n"
            )
            for _ in range(2):
                assert (await answer(reader))[0] == 200

    run(work())
    assert seen == ["x-other: 1", "x-request-id: mine-1"]


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_a_bound_that_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=f"OCTAVO_HTTP_HEAD_S is '{text}', but must be more than 0"):
        proxy_guard.protocol({"OCTAVO_HTTP_HEAD_S": text})
