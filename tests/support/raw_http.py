"""An HTTP server that says what a test wants byte by byte, in a thread of its own, on a free port of the loopback.

One answer per connection. `GET /v1/models` is answered here; every POST is the test's.
"""

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

MODEL = "tiny"


@dataclass(frozen=True)
class Posted:
    """One request: its path, its JSON body, its headers with names in lower case."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]


Answer = Callable[[Posted, asyncio.StreamWriter], Awaitable[None]]


@contextmanager
def raw_server(answer: Answer, models: str | None = None) -> Iterator[str]:
    """Serves until the block ends; gives the root URL. `models` replaces the body of the list of models."""
    listing = json.dumps({"data": [{"id": MODEL}, {"id": "other"}]}) if models is None else models
    listener = socket.create_server(("127.0.0.1", 0))
    loop = asyncio.new_event_loop()
    stopping = asyncio.Event()
    handlers: set[asyncio.Task[None] | None] = set()  # once its client has left, a silent one is held by nobody else

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(asyncio.current_task())
        try:
            posted = await _read(reader)
            if posted.body:
                await answer(posted, writer)
            else:
                writer.write(whole(200, listing))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client left, or the block ended
        finally:
            writer.close()
            handlers.discard(asyncio.current_task())

    async def serve() -> None:
        async with await asyncio.start_server(handle, sock=listener):
            await stopping.wait()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:  # one that ends may have begun another
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.sleep(0)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join()
        loop.close()


async def _read(reader: asyncio.StreamReader) -> Posted:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *rest = head.strip().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in rest)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Posted(first.split(" ")[1], json.loads(body) if body else {}, headers)


def whole(status: int, body: str) -> bytes:
    """A response with a length."""
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body.encode())}\r\n"
    return (head + "Connection: close\r\n\r\n" + body).encode()


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)
STREAM_END = b"0\r\n\r\n"


def piece(data: str) -> bytes:
    """One chunk of a chunked body."""
    return f"{len(data.encode()):x}\r\n{data}\r\n".encode()


def event(value: Any) -> str:
    """One server-sent event: JSON, or a string as it is."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"


def token(text: str, finish: str | None = None) -> dict[str, Any]:
    """A chunk of a completion."""
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": None}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The last chunk before [DONE]."""
    return {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}


def stream(*events: Any) -> bytes:
    """A whole streamed response."""
    return STREAM_HEAD + b"".join(piece(event(one)) for one in events) + STREAM_END


def full_answer(posted: Posted) -> bytes:
    """A good stream: as many tokens as asked for, one a chunk."""
    num = posted.body.get("max_tokens") or posted.body["max_completion_tokens"]
    prompt = posted.body.get("prompt", "")
    return stream(*(token("x") for _ in range(num)), usage(len(prompt), num), "[DONE]")


async def answers_fully(posted: Posted, writer: asyncio.StreamWriter) -> None:
    """An Answer."""
    writer.write(full_answer(posted))
    await writer.drain()


def reset(writer: asyncio.StreamWriter) -> None:
    """Ends the connection with a RST."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
