"""Clients that leave: over raw sockets, at every moment of a request, politely or with a reset."""

import asyncio
import json
import random
import socket
import struct
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

MOMENTS = ("in the head", "in the body", "at once", "soon", "at the first token", "in mid-stream", "not at all")
LATEST_S = 0.3
"""The latest of "soon": while it waits in the queue, is prefilled or decoded."""


async def leave(url: str, draw: random.Random, body: dict[str, Any], left: Counter[str]) -> None:
    """One request that is given up at a moment of `draw`'s choice; `left` counts where."""
    moment = draw.choice(MOMENTS)
    left[moment] += 1
    host, port = urlsplit(url).hostname, urlsplit(url).port
    reader, writer = await asyncio.open_connection(host, port)
    try:
        stream = moment in ("at the first token", "in mid-stream") or draw.random() < 0.5
        payload = json.dumps({**body, "stream": stream, "n": draw.choice((1, 1, 1, 3))}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: octavo\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n"
        ).encode()
        cut = {"in the head": draw.randrange(1, len(head)), "in the body": len(head) + draw.randrange(len(payload))}
        writer.write((head + payload)[: cut.get(moment)])
        await writer.drain()
        await _stay(moment, reader, draw)
        if draw.random() < 0.5:
            sock: socket.socket = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
    except ConnectionError:
        left["refused in the middle"] += 1
    finally:
        writer.close()


async def _stay(moment: str, reader: asyncio.StreamReader, draw: random.Random) -> None:
    if moment in ("in the head", "in the body", "soon"):
        await asyncio.sleep(draw.uniform(0, LATEST_S))
    elif moment == "at the first token":
        await _until(reader, 1)
    elif moment == "in mid-stream":
        await _until(reader, draw.randrange(2, 12))
    elif moment == "not at all":
        assert await asyncio.wait_for(reader.readline(), 200), "the socket was closed without an answer"


async def _until(reader: asyncio.StreamReader, num_events: int) -> None:
    """That many events, or the end of an answer that has fewer (a refusal has none)."""
    while num_events and (line := await asyncio.wait_for(reader.readline(), 200)):
        num_events -= line.startswith(b"data:")
        if line.startswith((b"{", b"data: [DONE]")):
            return


async def leave_all(url: str, body: dict[str, Any], *, count: int, at_once: int, seed: int = 0) -> Counter[str]:
    """`count` clients that leave, `at_once` of them side by side. Says where they left."""
    left: Counter[str] = Counter()
    slots = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with slots:
            await leave(url, random.Random(f"{seed}/{number}"), body, left)

    await asyncio.gather(*(one(number) for number in range(count)))
    return left
