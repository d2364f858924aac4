"""The token is checked before anything is parsed; TLS, limits, health and reflection do what they say."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from actors.channels import ChannelError, GrpcServer, WireCredentials, join_address, open_channel, serve_grpc
from protos.limits import MAX_MESSAGE_BYTES
from tests.support.pki import make_pki

TOKEN = "a-token-of-this-test"
SERVICE = "octavo.ExpertService"


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 240))


class Echo:
    """Sends back what it gets, and records every message that reached its deserializer."""

    def __init__(self) -> None:
        self.parsed: list[bytes] = []

    def parse(self, data: bytes) -> bytes:
        self.parsed.append(data)
        return data

    async def once(self, request: bytes, _context: object) -> bytes:
        return request

    async def stream(self, _requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        while isinstance(data := await context.read(), bytes):
            await context.write(data)

    def register(self, server: grpc.aio.Server) -> None:
        methods: dict[str, Any] = {
            "Once": grpc.unary_unary_rpc_method_handler(self.once, self.parse),
            "Stream": grpc.stream_stream_rpc_method_handler(self.stream, self.parse),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))


@asynccontextmanager
async def served(
    echo: Echo, credentials: WireCredentials | None = None, *, serving: bool = True
) -> AsyncIterator[GrpcServer]:
    server = await serve_grpc(
        echo.register,
        service=SERVICE,
        host="127.0.0.1",
        port=0,
        credentials=credentials or WireCredentials(TOKEN),
        serving=serving,
    )
    try:
        yield server
    finally:
        await server.stop(0)


def once(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary(f"/{SERVICE}/Once")


def stream(channel: grpc.aio.Channel) -> Any:
    return channel.stream_stream(f"/{SERVICE}/Stream")


async def _ask_and_hear(call: Any, message: bytes) -> Any:
    """Writing it may raise as well as reading the answer."""
    await call.write(message)
    return await call.read()


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def flood(call: Any) -> None:
    while True:
        await call.write(b"evil")


def test_the_token_opens_calls_and_streams() -> None:
    async def work() -> None:
        echo = Echo()
        async with served(echo) as server, open_channel(server.address, WireCredentials(TOKEN)) as channel:
            assert await once(channel)(b"one") == b"one"
            call = stream(channel)()
            await call.write(b"two")
            assert await call.read() == b"two"
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
        assert echo.parsed == [b"one", b"two"]

    run(work())


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer wrong"),),
        (("authorization", TOKEN),),
        (("authorization", f"Bearer {TOKEN}x"),),
        (("authorization", f"bearer {TOKEN}"),),
        (("authorization", ""),),
        (("authorization-bin", f"Bearer {TOKEN}".encode()),),
        (("token", f"Bearer {TOKEN}"),),
    ],
)
def test_a_strangers_bytes_reach_no_parser(metadata: tuple[tuple[str, str | bytes], ...]) -> None:
    async def work() -> None:
        echo = Echo()
        async with served(echo) as server, grpc.aio.insecure_channel(server.address) as channel:
            error = await refused(once(channel)(b"evil", metadata=metadata))
            assert error.code() == grpc.StatusCode.UNAUTHENTICATED
            assert error.details() == "missing or wrong bearer token"
            assert (await refused(stream(channel)(metadata=metadata).read())).code() == error.code()
            with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)):
                await flood(stream(channel)(metadata=metadata))
            unknown: Any = channel.unary_unary("/octavo.ExpertService/Nothing")
            assert (await refused(unknown(b"x"))).code() == grpc.StatusCode.UNAUTHENTICATED
        assert echo.parsed == []

    run(work())


def test_a_wrong_token_of_a_client_of_ours_is_refused() -> None:
    async def work() -> None:
        echo = Echo()
        async with served(echo) as server, open_channel(server.address, WireCredentials("other")) as channel:
            assert (await refused(once(channel)(b"x"))).code() == grpc.StatusCode.UNAUTHENTICATED
        assert echo.parsed == []

    run(work())


async def health(channel: grpc.aio.Channel, service: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


def test_health_follows_the_server_and_needs_the_token() -> None:
    async def work() -> None:
        kinds = health_pb2.HealthCheckResponse
        async with (
            served(Echo(), serving=False) as server,
            open_channel(server.address, WireCredentials(TOKEN)) as channel,
            grpc.aio.insecure_channel(server.address) as stranger,
        ):
            assert await health(channel, SERVICE) == kinds.NOT_SERVING
            await server.set_serving(True)
            assert await health(channel, SERVICE) == kinds.SERVING
            assert await health(channel, "") == kinds.SERVING
            assert (await refused(health(stranger, ""))).code() == grpc.StatusCode.UNAUTHENTICATED

    run(work())


def test_reflection_lists_the_services_to_those_with_the_token() -> None:
    async def listed(channel: grpc.aio.Channel) -> list[str]:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]))
        reply = await call.read()
        return [service.name for service in reply.list_services_response.service]

    async def work() -> None:
        async with (
            served(Echo()) as server,
            open_channel(server.address, WireCredentials(TOKEN)) as channel,
            grpc.aio.insecure_channel(server.address) as stranger,
        ):
            assert SERVICE in await listed(channel)
            assert (await refused(listed(stranger))).code() == grpc.StatusCode.UNAUTHENTICATED

    run(work())


def test_a_message_over_the_limit_is_a_clear_error_and_the_server_lives_on() -> None:
    async def work() -> None:
        echo = Echo()
        too_long = bytes(MAX_MESSAGE_BYTES + 1)
        unlimited = [("grpc.max_send_message_length", -1)]
        token = (("authorization", f"Bearer {TOKEN}"),)
        async with (
            served(echo) as server,
            open_channel(server.address, WireCredentials(TOKEN)) as channel,
            grpc.aio.insecure_channel(server.address, unlimited) as careless,
        ):
            ours = await refused(once(channel)(too_long))
            assert ours.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # said before it leaves
            theirs = await refused(once(careless)(too_long, metadata=token))
            assert theirs.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert str(MAX_MESSAGE_BYTES) in str(theirs.details())
            call = stream(careless)(metadata=token)
            streamed = await refused(_ask_and_hear(call, too_long))
            assert streamed.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert echo.parsed == []
            assert await once(channel)(b"still here") == b"still here"

    run(work())


def test_a_message_near_the_limit_passes_both_ways() -> None:
    async def work() -> None:
        async with served(Echo()) as server, open_channel(server.address, WireCredentials(TOKEN)) as channel:
            assert len(await once(channel)(bytes(MAX_MESSAGE_BYTES))) == MAX_MESSAGE_BYTES

    run(work())


def test_a_busy_port_is_a_clear_error() -> None:
    async def work() -> None:
        async with served(Echo()) as server:
            with pytest.raises(ChannelError, match=f"cannot listen on {server.address}"):
                await serve_grpc(
                    Echo().register,
                    service=SERVICE,
                    host="127.0.0.1",
                    port=server.port,
                    credentials=WireCredentials(TOKEN),
                )

    run(work())


def test_addresses_of_both_kinds() -> None:
    assert join_address("127.0.0.1", 80) == "127.0.0.1:80"
    assert join_address("::1", 80) == "[::1]:80"


# ---- TLS --------------------------------------------------------------------------------------------------


def credentials_of(pki: Path) -> WireCredentials:
    return WireCredentials(TOKEN, str(pki / "node.crt"), str(pki / "node.key"), str(pki / "ca.crt"))


def test_mutual_tls_lets_only_its_own_in(tmp_path: Path) -> None:
    ours, theirs = make_pki(tmp_path / "ours"), make_pki(tmp_path / "theirs")

    async def fails(channel: grpc.aio.Channel, metadata: Any = None) -> None:
        extra = {} if metadata is None else {"metadata": metadata}
        error = await refused(once(channel)(b"x", timeout=60, **extra))
        assert error.code() == grpc.StatusCode.UNAVAILABLE

    async def work() -> None:
        echo, mine = Echo(), credentials_of(ours)
        token = (("authorization", f"Bearer {TOKEN}"),)
        async with served(echo, mine) as server:
            async with open_channel(server.address, mine) as channel:
                assert await once(channel)(b"secret") == b"secret"
            async with open_channel(server.address, credentials_of(theirs)) as channel:
                await fails(channel)
            async with open_channel(server.address, WireCredentials(TOKEN)) as channel:
                await fails(channel)  # plain text at a TLS port
            nobody = grpc.ssl_channel_credentials((ours / "ca.crt").read_bytes())
            async with grpc.aio.secure_channel(server.address, nobody) as channel:
                await fails(channel, token)  # trusts the server, has no certificate
        assert echo.parsed == [b"secret"]

    run(work())


def test_one_certificate_serves_machines_that_it_does_not_name(tmp_path: Path) -> None:
    pki = make_pki(tmp_path / "ours", names=("octavo.internal",))
    by_address = credentials_of(pki)

    async def work() -> None:
        echo = Echo()
        async with served(echo, by_address) as server:
            for credentials, welcome in (
                (replace(by_address, tls_server_name="octavo.internal"), True),
                (replace(by_address, tls_server_name="another.internal"), False),
                (by_address, False),
            ):
                async with open_channel(server.address, credentials) as channel:
                    if welcome:
                        assert await once(channel)(b"by name") == b"by name"
                    else:
                        assert (await refused(once(channel)(b"x", timeout=60))).code() == grpc.StatusCode.UNAVAILABLE
        assert echo.parsed == [b"by name"]

    run(work())


def test_tls_does_not_replace_the_token(tmp_path: Path) -> None:
    mine = credentials_of(make_pki(tmp_path / "ours"))

    async def work() -> None:
        async with served(Echo(), mine) as server:
            other = WireCredentials("another", mine.tls_cert, mine.tls_key, mine.tls_ca)
            async with open_channel(server.address, other) as channel:
                error = await refused(once(channel)(b"x", timeout=60))
                assert error.code() == grpc.StatusCode.UNAUTHENTICATED

    run(work())


def test_a_server_certificate_alone_is_tls_without_client_certificates(tmp_path: Path) -> None:
    pki = make_pki(tmp_path / "ours")
    one_way = WireCredentials(TOKEN, str(pki / "node.crt"), str(pki / "node.key"))

    async def work() -> None:
        async with served(Echo(), one_way) as server:
            trusting = grpc.ssl_channel_credentials((pki / "ca.crt").read_bytes())
            token = (("authorization", f"Bearer {TOKEN}"),)
            async with grpc.aio.secure_channel(server.address, trusting) as channel:
                assert await once(channel)(b"x", metadata=token) == b"x"
            async with open_channel(server.address, one_way) as channel:  # the system does not know this authority
                assert (await refused(once(channel)(b"x", timeout=60))).code() == grpc.StatusCode.UNAVAILABLE

    run(work())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"token": ""}, "auth_token"),
        ({"token": "with\nline"}, "auth_token"),
        ({"token": "ümlaut"}, "auth_token"),
        ({"token": "t", "tls_cert": "c"}, "tls_cert and tls_key must be given together"),
        ({"token": "t", "tls_key": "k"}, "tls_cert and tls_key must be given together"),
        ({"token": "t", "tls_ca": "a"}, "tls_ca needs tls_cert and tls_key"),
        ({"token": "t", "tls_cert": "c", "tls_key": "k", "tls_server_name": "n"}, "tls_server_name needs tls_ca"),
    ],
)
def test_credentials_that_contradict_themselves(fields: dict[str, str], said: str) -> None:
    with pytest.raises(ChannelError, match=said):
        WireCredentials(**fields)


def test_a_missing_tls_file_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing.pem")
    credentials = WireCredentials("t", missing, missing)
    with pytest.raises(ChannelError, match=r"tls_key: cannot read .*nothing.pem"):
        credentials.for_server()


def test_a_repr_keeps_the_secret() -> None:
    assert TOKEN not in repr(WireCredentials(TOKEN))
