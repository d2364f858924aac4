"""Expert actors that load from each other: a small checkpoint, their arguments, and donors that go wrong on purpose."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import torch

from actors.channels import serve_grpc
from actors.expert.actor import ExpertActor
from actors.expert.model_facts import ModelFacts
from actors.expert.service import SERVICE
from model.experts import ExpertColumn
from model.numerics import same_bits
from model.storage.checkpoint import Checkpoint, Expert
from model.storage.integrity import make_manifest
from protos import expert_pb2 as pb
from tests.support.checkpoints import write_mixtral
from tests.support.experts import TOKEN, channel_to, credentials

HIDDEN, FFN, LAYERS, EXPERTS = 64, 9000, 3, 4
WEIGHT_BYTES = HIDDEN * FFN * 2
LAYER_BYTES = 3 * WEIGHT_BYTES
COLUMN_BYTES = LAYERS * LAYER_BYTES
MESSAGES = 2
"""A weight of this size goes in so many messages."""

Tamper = Callable[[int, bytes], Awaitable[bytes]]
"""Given the number of a message, from 0 over all calls, and its bytes: what is sent instead. It may wait, or raise."""


def write_model(path: Path) -> None:
    write_mixtral(path, hidden=HIDDEN, ffn=FFN, layers=LAYERS, experts=EXPERTS, dtype=torch.float16)


def checksums(model: Path) -> dict[str, int]:
    """Of every expert's weights: in this layout a stored tensor is one weight."""
    checkpoint = Checkpoint.open(model)
    records = make_manifest(checkpoint).tensors
    names = [name for expert in range(EXPERTS) for name in checkpoint.names(Expert(expert))]
    return {name: records[checkpoint.stored(name)[0].name].parts[0] for name in names}


def arguments(model: Path, **changes: Any) -> dict[str, Any]:
    """Of an actor that holds expert 1, with `model` on its machine."""
    return {
        "replica_id": "expert-1-r1",
        "expert_ids": [1],
        "first_layer": 0,
        "num_layers": LAYERS,
        "model": str(model),
        "kernel": "auto",
        "device": "cpu",
        "auth_token": TOKEN,
        "checksums": checksums(model),
        "model_facts": ModelFacts.of(Checkpoint.open(model)).plain(),
        **changes,
    }


def elsewhere(model: Path, copy: Path, **changes: Any) -> dict[str, Any]:
    """The same with a copy of the checkpoint, or of another one, on the actor's machine."""
    return {**arguments(model), "model": str(copy), **changes}


def nowhere(model: Path, **changes: Any) -> dict[str, Any]:
    """The same on a machine without the checkpoint."""
    return {**arguments(model), "model": "/nothing/here", **changes}


@asynccontextmanager
async def started(**kwargs: Any) -> AsyncIterator[tuple[ExpertActor, dict[str, Any]]]:
    """An actor that has settled, and its `info`."""
    async with begun(**kwargs) as actor:
        yield actor, await actor.wait_settled()


@asynccontextmanager
async def begun(**kwargs: Any) -> AsyncIterator[ExpertActor]:
    """An actor that may still load."""
    actor = ExpertActor(**kwargs)
    await actor.start()
    try:
        yield actor
    finally:
        await actor.stop()


def assert_same_bits(actor: ExpertActor, model: Path, experts: tuple[int, ...] = (1,)) -> None:
    """What the actor holds answers as a column that is loaded from disk right here."""
    x_MD = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(5))
    for expert in experts:
        column = ExpertColumn.load(Checkpoint.open(model), expert, range(LAYERS), "fp16", "cpu")
        for layer in range(LAYERS):
            held = actor._replica.find(layer, expert)
            assert held is not None, (layer, expert)
            assert held.canary(layer) == column.canary(layer)
            assert same_bits(held.forward(layer, x_MD), column.forward(layer, x_MD))


def fetch_of(channel: grpc.aio.Channel) -> Any:
    """The stub of FetchColumn; replies are bytes."""
    return channel.unary_stream(f"/{SERVICE}/FetchColumn", pb.FetchColumnRequest.SerializeToString)


class FalseDonor:
    """Passes on what the replica at `address` sends, through `tamper`. `calls` counts those that began."""

    def __init__(self, address: str, tamper: Tamper) -> None:
        self.calls = 0
        self.open = 0
        self._address = address
        self._tamper = tamper
        self._sent = 0

    def register(self, server: grpc.aio.Server) -> None:
        handler = grpc.unary_stream_rpc_method_handler(self._fetch, pb.FetchColumnRequest.FromString)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"FetchColumn": handler}),))

    async def _fetch(self, request: pb.FetchColumnRequest, context: Any) -> None:
        self.calls += 1
        self.open += 1
        try:
            async with channel_to(self._address) as channel:
                async for data in fetch_of(channel)(request):
                    number = self._sent
                    self._sent += 1
                    await context.write(await self._tamper(number, data))
        finally:
            self.open -= 1


@asynccontextmanager
async def false_donor(address: str, tamper: Tamper) -> AsyncIterator[tuple[str, FalseDonor]]:
    """Its address, and itself."""
    donor = FalseDonor(address, tamper)
    server = await serve_grpc(donor.register, service=SERVICE, host="127.0.0.1", port=0, credentials=credentials())
    try:
        yield server.address, donor
    finally:
        await server.stop(0)


async def until(true: Callable[[], bool]) -> None:
    """For what nobody tells of; bounded by the test's own time."""
    while not true():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def honest(_number: int, data: bytes) -> bytes:
    return data


def silent_from(number: int) -> tuple[Tamper, asyncio.Event]:
    """Passes on the first messages; then nothing until the event is set."""
    release = asyncio.Event()

    async def tamper(at: int, data: bytes) -> bytes:
        if at >= number:
            await release.wait()
        return data

    return tamper, release
