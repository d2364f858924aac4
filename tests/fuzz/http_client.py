"""A client for requests that are none: writes bytes, reads what comes, and judges the answer.

Whole requests go over a connection that is kept; what is no request, or leaves early, gets a connection of its own.
"""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.fuzz.http_requests import Asked

ANSWER_S = 120.0
BROKEN_S = 2.0
"""What is no request may wait for its rest: the other side's clock ends that, and this side's sooner."""
ENOUGH_BYTES = 4 << 20
# What the front door says of itself when it is not ready or a request took too long; never a surprise.
DECLARED_5XX = {503: "service_unavailable", 504: "request_timeout"}


@dataclass(frozen=True)
class Answer:
    """`status` 0: there was none. `silent`: none came, though one must."""

    status: int
    body: bytes
    silent: bool = False

    @property
    def undeclared(self) -> bool:
        """A 5xx that the front door does not promise."""
        return self.status >= 500 and (self.status not in DECLARED_5XX or self.code != DECLARED_5XX[self.status])

    @property
    def code(self) -> str:
        """The code of an error body, empty where there is none."""
        try:
            return str(json.loads(self.body)["error"]["code"])
        except (ValueError, LookupError, TypeError):
            return ""


class Client:
    """One sender: a connection for whole requests, and others for the rest."""

    def __init__(self, host: str, port: int) -> None:
        self._place = (host, port)
        self._kept: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, asked: Asked) -> Answer:
        """The answer to one request."""
        if not asked.kept:
            return await send_once(*self._place, asked)
        was_used = self._kept is not None
        answer = await self._on_kept(asked)
        if answer is None and was_used:  # the other side had ended the connection before it had read this
            answer = await self._on_kept(asked)
        return answer or Answer(0, b"", silent=True)

    def close(self) -> None:
        """Drops the connection."""
        if self._kept is not None:
            _reset(self._kept[1])
            self._kept = None

    async def _on_kept(self, asked: Asked) -> Answer | None:
        """None: the connection ended before an answer."""
        try:
            self._kept = self._kept or await asyncio.open_connection(*self._place, limit=1 << 20)
            reader, writer = self._kept
            async with asyncio.timeout(ANSWER_S):
                writer.write(asked.data)
                status, fields = await read_head(reader)
                body = b"".join([piece async for piece in read_body(reader, fields)])
            if fields.get("connection", "").lower() == "close":
                self.close()
            return Answer(status, body)
        except (TimeoutError, ValueError, IndexError, asyncio.LimitOverrunError):  # none, or one that is no HTTP
            self.close()
            return Answer(0, b"", silent=True)
        except (OSError, EOFError):
            self.close()
            return None


async def send_once(host: str, port: int, asked: Asked) -> Answer:
    """One connection, one request. What the other side does with the connection is its business."""
    got = bytearray()
    try:
        async with _connection(host, port) as (reader, writer):
            writer.write(asked.data)
            await writer.drain()
            if asked.leave_after is not None:
                if asked.leave_after:
                    async with asyncio.timeout(ANSWER_S):
                        await reader.read(asked.leave_after)
                return Answer(0, b"")
            async with asyncio.timeout(ANSWER_S if asked.well_formed else BROKEN_S):
                while len(got) < ENOUGH_BYTES and (piece := await reader.read(1 << 16)):
                    got += piece
        return _parsed(bytes(got))
    except TimeoutError:  # a long answer that has begun is no silence
        return Answer(_parsed(bytes(got)).status, b"", silent=asked.well_formed and not got)
    except ConnectionRefusedError:
        return Answer(0, b"", silent=True)
    except OSError:
        return Answer(_parsed(bytes(got)).status, b"")


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and fields by lower-case name. Raises EOFError, OSError."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return int(first.split(None, 2)[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}


async def read_body(reader: asyncio.StreamReader, fields: dict[str, str]) -> AsyncIterator[bytes]:
    """The pieces of a body, as the fields say that they come. Raises EOFError, OSError."""
    if fields.get("transfer-encoding") != "chunked":
        yield await reader.readexactly(int(fields.get("content-length", "0")))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)


@asynccontextmanager
async def _connection(host: str, port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        _reset(writer)


def _parsed(data: bytes) -> Answer:
    head, _, body = data.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    status = int(words[1]) if len(words) > 1 and words[0].startswith(b"HTTP/") and words[1].isdigit() else 0
    return Answer(status, body)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Leaves as one whose cable was pulled; nothing waits in the kernel afterwards."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
