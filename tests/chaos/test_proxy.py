"""The fault proxy, with real sockets: what it lets through is unharmed, and what it harms it harms as it says."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from tests.chaos.proxy import BLACKOUT, CALM, FaultProxy, Weather, fault_proxy

BIG = bytes(range(256)) * 4096  # 1 MiB
TIMEOUT_S = 120.0


@asynccontextmanager
async def echo_through_proxy() -> AsyncIterator[FaultProxy]:
    """A server that sends back what it gets, and a proxy before it."""

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_echo(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    tasks: set[asyncio.Task[None]] = set()
    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    try:
        async with fault_proxy(f"{host}:{port}", random.Random(0)) as proxy:
            yield proxy
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


class Peer:
    """One connection through the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def swap(self, data: bytes) -> bytes:
        """Sends, and reads as much as was sent. Raises OSError or IncompleteReadError when cut."""
        self._writer.write(data)
        _, back = await asyncio.gather(self._writer.drain(), self._reader.readexactly(len(data)))
        return back

    def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def connected(proxy: FaultProxy) -> AsyncIterator[Peer]:
    host, _, port = proxy.address.rpartition(":")
    peer = Peer(*await asyncio.open_connection(host, int(port)))
    try:
        yield peer
    finally:
        peer.close()


def run(work: Callable[[FaultProxy], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(TIMEOUT_S), echo_through_proxy() as proxy:
            await work(proxy)

    asyncio.run(main())


def test_calm_weather_and_delays_change_nothing() -> None:
    async def work(proxy: FaultProxy) -> None:
        async with connected(proxy) as peer:
            assert await peer.swap(BIG) == BIG
            proxy.turn(Weather(delay_s=0.001, jitter_s=0.002))
            assert await peer.swap(BIG) == BIG

    run(work)


@pytest.mark.parametrize("weather", [BLACKOUT, Weather(silent_to_server=True), Weather(silent_to_client=True)])
def test_a_silence_holds_bytes_and_loses_none(weather: Weather) -> None:
    async def work(proxy: FaultProxy) -> None:
        async with connected(proxy) as peer:
            assert await peer.swap(b"before") == b"before"
            proxy.turn(weather)
            swap = asyncio.create_task(peer.swap(BIG))
            done, _ = await asyncio.wait([swap], timeout=0.2)
            assert not done
            proxy.turn(CALM)
            assert await swap == BIG

    run(work)


def test_a_reset_comes_in_the_middle_of_a_message() -> None:
    async def work(proxy: FaultProxy) -> None:
        async with connected(proxy) as peer, connected(proxy) as other:
            assert await peer.swap(b"before") == b"before"
            assert await other.swap(b"before") == b"before"
            proxy.reset_in_mid_message()
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await peer.swap(b"x" * 1000)
        async with connected(proxy) as peer:
            assert await peer.swap(b"after") == b"after"
        assert proxy.counts["resets"] == 1

    run(work)


def test_connections_are_lost_with_the_probability_that_was_said() -> None:
    async def work(proxy: FaultProxy) -> None:
        async with connected(proxy) as one, connected(proxy) as two:
            assert await one.swap(b"a") + await two.swap(b"b") == b"ab"
            assert proxy.lose_connections(0.0) == 0
            assert await one.swap(b"a") + await two.swap(b"b") == b"ab"
            assert proxy.lose_connections(1.0) == 2
            for peer in (one, two):
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await peer.swap(b"x")

    run(work)


def test_new_connections_can_be_refused_or_doomed() -> None:
    async def work(proxy: FaultProxy) -> None:
        for weather in (Weather(refuses=True), Weather(loses_connection=1.0)):
            proxy.turn(weather)
            async with connected(proxy) as peer:
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await peer.swap(b"x" * 1000)
        proxy.turn(CALM)
        async with connected(proxy) as peer:
            assert await peer.swap(b"after") == b"after"

    run(work)


def test_a_flipped_bit_is_one_bit() -> None:
    async def work(proxy: FaultProxy) -> None:
        async with connected(proxy) as peer:
            proxy.turn(Weather(flips_bit=1.0))
            sent = bytes(1000)
            back = await peer.swap(sent)
            assert sum(byte.bit_count() for byte in back) == 2  # one on the way there, one on the way back
            assert proxy.counts["flips"] == 2

    run(work)


def test_a_server_that_is_not_there_ends_the_connection() -> None:
    async def main() -> None:
        nobody = fault_proxy("127.0.0.1:1", random.Random(0))
        async with asyncio.timeout(TIMEOUT_S), nobody as proxy, connected(proxy) as peer:
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await peer.swap(b"x")

    asyncio.run(main())
