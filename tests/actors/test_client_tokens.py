"""Tokens of gRPC clients: how their file is read, and that they open what they should and nothing else."""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import grpc
import pytest

from actors.channels import ClientAccess, WireCredentials, open_channel, serve_grpc
from actors.client_tokens import MAX_FILE_BYTES, ClientTokenError, ClientTokens

ONE, TWO = "one-token-of-sixteen", "another-token-of-sixteen"
OURS = "the-token-of-the-cluster"
SERVICE = "octavo.CoordinatorService"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "clients"
    path.write_text(text, encoding="latin-1")
    return path


def bearer(token: str) -> tuple[tuple[str, str | bytes], ...]:
    return (("user-agent", "x"), ("authorization", f"Bearer {token}"))


def test_tokens_are_found_by_themselves_or_by_their_hash(tmp_path: Path) -> None:
    hashed = hashlib.sha256(TWO.encode()).hexdigest()
    tokens = ClientTokens.load(written(tmp_path, f"# ours\n\nalpha {ONE}\n  beta\tsha256:{hashed}\n"))
    assert tokens.who(bearer(ONE)) == "alpha"
    assert tokens.who((("authorization", f"Bearer {TWO}".encode()),)) == "beta"


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        bearer(OURS),
        bearer(ONE + "x"),
        bearer(ONE[:-1]),
        bearer(""),
        bearer(" " + ONE),
        bearer("Bearer " + ONE),
        (("authorization", ONE),),
        (("authorization", f"bearer {ONE}"),),
        (("x-authorization", f"Bearer {ONE}"),),
        (("authorization", f"Bearer {hashlib.sha256(ONE.encode()).hexdigest()}"),),
    ],
)
def test_anything_else_is_nobody(tmp_path: Path, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
    assert ClientTokens.load(written(tmp_path, f"alpha {ONE}")).who(metadata) is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (ONE, "line 1: must be NAME TOKEN"),
        (f"alpha {ONE} more", "line 1: must be NAME TOKEN"),
        (f"\n-alpha {ONE}", "line 2: must be NAME TOKEN"),
        ("alpha short", "line 1: a token has 16 to 512"),
        (f"alpha {'x' * 513}", "line 1: a token has 16 to 512"),
        ("alpha sixteen-and-möre-chars", "line 1: a token has 16 to 512"),
        ("alpha sha256:0123", "line 1: a token has 16 to 512"),
        (f"alpha {ONE}\nalpha {TWO}", "line 2: the name or the token is there already"),
        (f"alpha {ONE}\nbeta {ONE}", "line 2: the name or the token is there already"),
        ("#" * (MAX_FILE_BYTES + 1), "larger than"),
    ],
)
def test_a_bad_file_is_refused_without_showing_a_token(tmp_path: Path, text: str, complaint: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ClientTokenError) as caught:
        ClientTokens.load(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: {complaint}")
    assert all(secret not in said for secret in (ONE, TWO, "short", "möre"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClientTokenError, match="nobody: cannot be read: No such file"):
        ClientTokens.load(tmp_path / "nobody")


def test_no_token_is_kept(tmp_path: Path) -> None:
    tokens = ClientTokens.load(written(tmp_path, f"alpha {ONE}"))
    assert ONE not in repr(vars(tokens))
    assert ONE not in repr(tokens)


class Counting:
    """One method for clients and one for the cluster, and all that reached their deserialiser."""

    def __init__(self) -> None:
        self.parsed: list[bytes] = []

    def parse(self, data: bytes) -> bytes:
        self.parsed.append(data)
        return data

    async def answer(self, request: bytes, _context: object) -> bytes:
        return request

    def register(self, server: grpc.aio.Server) -> None:
        method = grpc.unary_unary_rpc_method_handler(self.answer, self.parse)
        handlers: dict[str, Any] = {"Generate": method, "Drain": method}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def test_a_client_may_call_its_own_method_only(tmp_path: Path) -> None:
    clients = ClientAccess(ClientTokens.load(written(tmp_path, f"alpha {ONE}")), frozenset({f"/{SERVICE}/Generate"}))

    async def code_of(address: str, token: str, method: str) -> grpc.StatusCode:
        async with open_channel(address, WireCredentials(token)) as channel:
            try:
                assert await channel.unary_unary(method)(b"data") == b"data"
            except grpc.aio.AioRpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    async def work() -> None:
        counting = Counting()
        server = await serve_grpc(
            counting.register,
            service=SERVICE,
            host="127.0.0.1",
            port=0,
            credentials=WireCredentials(OURS),
            clients=clients,
        )
        try:
            health, reflect = "/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/X"
            for method in (f"/{SERVICE}/Drain", health, reflect, f"/{SERVICE}/generate", f"/{SERVICE}/Generate/"):
                assert await code_of(server.address, ONE, method) is grpc.StatusCode.PERMISSION_DENIED, method
            assert await code_of(server.address, "some-other-token-here", f"/{SERVICE}/Generate") is (
                grpc.StatusCode.UNAUTHENTICATED
            )
            assert counting.parsed == [], "what is refused is not parsed"
            assert server.rejected == 6
            for token, method in ((ONE, "Generate"), (OURS, "Generate"), (OURS, "Drain")):
                assert await code_of(server.address, token, f"/{SERVICE}/{method}") is grpc.StatusCode.OK
            assert len(counting.parsed) == 3
            assert server.rejected == 6
        finally:
            await server.stop(0)

    asyncio.run(work())
