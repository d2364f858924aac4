"""A TCP proxy that does what bad networks do: delays, silences (one way or both), resets in mid-message, flipped bits.

It stands between a coordinator and one replica. Bytes are never left out of a connection that goes on, because TCP does
not do that either: a silence holds them, as lost packets would be sent again after it. Seeded, and switched while it
runs.
"""

import asyncio
import contextlib
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

PIECE_BYTES = 64 * 1024
QUEUED_PIECES = 64
CONNECT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of no time: closing sends a reset


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What happens to bytes. Probabilities are per connection made, or per piece of up to 64 KiB."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    silent_to_server: bool = False
    silent_to_client: bool = False
    refuses: bool = False
    loses_connection: float = 0.0
    flips_bit: float = 0.0


CALM = Weather()
BLACKOUT = Weather(silent_to_server=True, silent_to_client=True)


@dataclass(slots=True, eq=False)
class _Link:
    """One client's connection and the one made for it to the server."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    doomed: bool = False  # the next piece is cut in its middle, and then both ends are reset

    def reset(self) -> None:
        for writer in (self.client, self.server):
            raw = writer.get_extra_info("socket")
            if raw is not None and raw.fileno() >= 0:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()


@dataclass(slots=True, eq=False)
class FaultProxy:
    """Listens on a free port of the loopback and forwards to `target` (host:port). `counts` says what it did."""

    target: str
    rng: random.Random
    weather: Weather = CALM
    counts: Counter[str] = field(default_factory=Counter)
    address: str = ""
    _links: set[_Link] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _server: asyncio.Server | None = None
    _serving: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self) -> None:
        """Begins to listen; `address` is then set."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=PIECE_BYTES)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"

    def turn(self, weather: Weather) -> None:
        """From now on; what was held goes on its way when the silence is over."""
        self.weather = weather
        self._changed.set()
        self._changed = asyncio.Event()

    def reset_in_mid_message(self) -> None:
        """The next piece of every connection is cut in its middle, and the connection reset."""
        for link in self._links:
            link.doomed = True

    def lose_connections(self, share: float) -> int:
        """Resets each connection with this probability; returns how many."""
        lost = [link for link in self._links if self.rng.random() < share]
        for link in lost:
            link.reset()
        self.counts["resets"] += len(lost)
        return len(lost)

    async def close(self) -> None:
        """Ends every connection and stops listening."""
        if self._server is not None:
            self._server.close()
        for link in self._links:
            link.reset()
        while self._serving:  # a connection that was being accepted begins another
            for task in self._serving:
                task.cancel()
            await asyncio.gather(*self._serving, return_exceptions=True)
            await asyncio.sleep(0)  # the transports' turn to close

    def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        """A task of our own: asyncio's would report its cancellation as an error."""
        task = asyncio.create_task(self._guarded(reader, client))
        self._serving.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._serving.discard(task)
            client.transport.abort()  # a task that is cancelled before it begins closes nothing

        task.add_done_callback(ended)

    async def _guarded(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            await self._serve(reader, client)
        except OSError:  # either end went away, which is what proxies see all day
            client.transport.abort()
        finally:
            await _let_go(client)

    async def _serve(self, from_client: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.counts["connections"] += 1
        if self.weather.refuses:
            client.transport.abort()
            return
        host, _, port = self.target.rpartition(":")
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            from_server, server = await asyncio.open_connection(host, int(port), limit=PIECE_BYTES)
        link = _Link(client, server, doomed=self.rng.random() < self.weather.loses_connection)
        self._links.add(link)
        pumps = [
            asyncio.create_task(self._pump(link, from_client, server, to_server=True)),
            asyncio.create_task(self._pump(link, from_server, client, to_server=False)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._links.discard(link)
            for pump in pumps:
                pump.cancel()
            try:
                await asyncio.gather(*pumps, return_exceptions=True)
                await _let_go(server)
            finally:
                server.transport.abort()  # also when this is cancelled while it ends

    async def _pump(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_server: bool
    ) -> None:
        """Reading and writing are two tasks, so that a delay is no limit on the bytes under way."""
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_PIECES)
        sending = asyncio.create_task(self._send(link, pieces, writer, to_server))
        try:
            while data := await reader.read(PIECE_BYTES):
                wait_s = self.weather.delay_s + self.rng.random() * self.weather.jitter_s
                await pieces.put((asyncio.get_running_loop().time() + wait_s, data))
            await pieces.put((0.0, b""))
            await sending
        finally:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sending

    async def _send(
        self, link: _Link, pieces: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, to_server: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s, data = await pieces.get()
            if not data:
                return
            if due_s > loop.time():
                await asyncio.sleep(due_s - loop.time())
            while self._is_silent(to_server):
                await self._changed.wait()
            if link.doomed:
                writer.write(data[: len(data) // 2])
                await writer.drain()
                self.counts["resets"] += 1
                link.reset()
                return
            self.counts["bytes"] += len(data)
            writer.write(self._perhaps_flipped(data))
            await writer.drain()

    def _is_silent(self, to_server: bool) -> bool:
        return self.weather.silent_to_server if to_server else self.weather.silent_to_client

    def _perhaps_flipped(self, data: bytes) -> bytes:
        if not self.weather.flips_bit or self.rng.random() >= self.weather.flips_bit:
            return data
        self.counts["flips"] += 1
        bit = self.rng.randrange(len(data) * 8)
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        return bytes(flipped)


async def _let_go(writer: asyncio.StreamWriter) -> None:
    """Closes when what was written is on its way, or soon in any case."""
    writer.close()
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        pass
    finally:
        writer.transport.abort()


@asynccontextmanager
async def fault_proxy(target: str, rng: random.Random) -> AsyncIterator[FaultProxy]:
    """A proxy in calm weather."""
    proxy = FaultProxy(target, rng)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
