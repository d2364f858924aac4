"""What a port may hold for its peers is a product of numbers, and the port refuses one more of each."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from actors.channels import GrpcServer, WireCredentials, open_channel, serve_grpc
from actors.port_limits import CONNECTION_BYTES, COORDINATOR_PORT, EXPERT_PORT, STREAM_BYTES, PortLimits
from tests.fuzz.unread_peer import Plan, send_all

pytestmark = pytest.mark.anyio
TOKEN = "a-token-for-tests-only"
SERVICE = "octavo.TestService"
NEVER = f"/{SERVICE}/Never"
TINY = PortLimits(streams=2, window_bytes=100_000)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def served(limits: PortLimits) -> AsyncIterator[GrpcServer]:
    """`Never` reads nothing; `Echo` sends one message back."""

    async def never(_requests: object, _context: object) -> None:
        await asyncio.Event().wait()

    async def echo(request: bytes, _context: object) -> bytes:
        return request

    def register(server: grpc.aio.Server) -> None:
        methods: dict[str, Any] = {
            "Never": grpc.stream_stream_rpc_method_handler(never),
            "Echo": grpc.unary_unary_rpc_method_handler(echo),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))

    credentials = WireCredentials(TOKEN)
    server = await serve_grpc(
        register, service=SERVICE, host="127.0.0.1", port=0, credentials=credentials, limits=limits
    )
    try:
        yield server
    finally:
        await server.stop(0)


def plan(server: GrpcServer, **more: Any) -> Plan:
    return Plan(address=server.address, path=NEVER, token=TOKEN, **more)


def test_the_bound_is_the_product_of_its_parts() -> None:
    assert TINY.unread_bytes == 2 * (100_000 + STREAM_BYTES) + CONNECTION_BYTES


@pytest.mark.parametrize(("limits", "most"), [(EXPERT_PORT, 5 << 20), (COORDINATOR_PORT, 4 << 20)])
def test_the_real_ports_bounds_are_what_the_readme_says(limits: PortLimits, most: int) -> None:
    assert limits.unread_bytes < most
    assert limits.calls >= 3 * 64, "three of each of as many coordinators as there may be"


async def test_what_nobody_reads_is_taken_up_to_the_window_and_no_further() -> None:
    most = 2 * 2 * TINY.window_bytes
    async with served(TINY) as server:
        held, facts = await asyncio.to_thread(send_all, plan(server, connections=2, enough_bytes=most, longest_s=120.0))
        for connection in held:
            connection.sock.close()
    assert facts == {"sent": most, "ended": 0, "streams": 4, "closed": 0}


async def test_a_message_far_larger_than_the_window_passes() -> None:
    async with served(TINY) as server, open_channel(server.address, WireCredentials(TOKEN)) as channel:
        message = bytes(range(256)) * (20 << 12)
        assert await channel.unary_unary(f"/{SERVICE}/Echo")(message, timeout=120) == message


async def test_streams_beyond_the_limit_wait_for_one_to_end() -> None:
    async with served(TINY) as server, open_channel(server.address, WireCredentials(TOKEN)) as channel:
        first, second = (channel.stream_stream(NEVER)() for _ in range(2))
        await first.wait_for_connection()
        await second.wait_for_connection()
        asked = asyncio.ensure_future(channel.unary_unary(f"/{SERVICE}/Echo")(b"later", timeout=120))
        done, _ = await asyncio.wait((asked,), timeout=0.2)
        assert not done
        first.cancel()
        assert await asked == b"later"
        second.cancel()


async def test_a_peer_that_says_nothing_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.channels.HANDSHAKE_S", 1)
    async with served(TINY) as server:
        host, port = server.address.rsplit(":", 1)

        def wait() -> None:
            with socket.create_connection((host, int(port)), timeout=60) as sock:
                while sock.recv(4096):
                    pass

        await asyncio.to_thread(wait)  # ends when the port ends it
