"""Replicas for tests of the wire: columns that compute something simple, served over real gRPC in this process."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch

from actors.channels import GrpcServer, WireCredentials, open_channel, serve_grpc
from actors.expert.compute_thread import ComputeThread
from actors.expert.desk import Desk
from actors.expert.lane_server import LaneServer
from actors.expert.replica import Column, ExpertReplica
from actors.expert.service import SERVICE, ExpertService, LoadError
from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from protos.expert_pb2 import REPLICA_STATE_READY

TOKEN = "a-token-for-all-tests"
WIDTH = 4
FAR_FUTURE_US = 4_000_000_000_000_000  # the year 2096


def run(work: Coroutine[Any, Any, None], timeout_s: float = 240.0) -> None:
    """Runs a test's coroutine in an event loop of its own; the bound is for one that hangs."""

    async def bounded() -> None:
        async with asyncio.timeout(timeout_s):
            await work

    asyncio.run(bounded())


def credentials() -> WireCredentials:
    return WireCredentials(TOKEN)


def answer(expert: int, layer: int, x_MD: torch.Tensor) -> torch.Tensor:
    """What a FakeColumn computes."""
    return x_MD * (expert + 2) + layer


@dataclass
class FakeColumn:
    """Computes `answer`. While `gate` is clear it waits; `error` is raised instead of answering."""

    expert: int
    layers: range = range(2)
    kernel: str = "fake"
    numerics_domain: str = "fake"
    weight_bytes: int = 8
    error: Exception | None = None
    canaries: dict[int, bytes] = field(default_factory=dict)
    calls: list[tuple[int, int]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def forward(self, layer: int, x_MD: torch.Tensor) -> torch.Tensor:
        self.entered.set()
        assert self.gate.wait(200)
        self.calls.append((layer, len(x_MD)))
        if self.error is not None:
            raise self.error
        return answer(self.expert, layer, x_MD)

    def canary(self, layer: int) -> bytes:
        return self.canaries.get(layer, b"as ever")


@dataclass
class Served:
    """A replica that listens."""

    replica: ExpertReplica
    service: ExpertService
    server: GrpcServer
    loads: list[tuple[int, range]]
    compute: ComputeThread
    lanes: LaneServer

    def info(self, *, replica_id: str | None = None, address: str | None = None) -> ReplicaInfo:
        """Its entry in a map."""
        about = self.replica.describe()
        return ReplicaInfo(
            replica_id=ReplicaId(replica_id or about.replica_id),
            expert_ids=tuple(ExpertId(expert) for expert in about.expert_ids),
            first_layer=LayerId(about.first_layer),
            num_layers=about.num_layers,
            address=address or self.server.address,
            node_id=NodeId("node"),
            numerics_domain=about.numerics_domain,
        )


@asynccontextmanager
async def served(
    *columns: Column,
    experts: Sequence[int],
    replica_id: str = "replica",
    port: int = 0,
    ready: bool = True,
    make_lanes: Callable[[Desk, ComputeThread], LaneServer] = LaneServer,
    **options: Any,
) -> AsyncIterator[Served]:
    """Serves `columns`, the columns of `experts`; `options` go to Desk."""
    compute = ComputeThread(replica_id, 1)
    compute.start()
    replica = ExpertReplica(replica_id, tuple(experts), range(2), hidden_size=WIDTH)
    for expert, column in zip(experts, columns, strict=True):
        replica.add(expert, column)
    loads: list[tuple[int, range]] = []

    async def load(expert: int, layers: range) -> int:
        loads.append((expert, layers))
        if expert > 99:
            raise LoadError(f"expert {expert} does not exist")
        return 123

    desk = Desk(replica, **{"max_queue_tokens": 1024, **options})
    lanes = make_lanes(desk, compute)
    lanes.watch()
    service = ExpertService(desk, compute, load, lanes)
    server = await serve_grpc(service.register, service=SERVICE, host="127.0.0.1", port=port, credentials=credentials())
    if ready:
        replica.settle(REPLICA_STATE_READY)
    try:
        yield Served(replica, service, server, loads, compute, lanes)
    finally:
        await server.stop(0)
        await compute.stop()
        lanes.close()


@asynccontextmanager
async def channel_to(address: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel with the token."""
    async with open_channel(address, credentials()) as channel:
        yield channel


def map_of(*replicas: ReplicaInfo, epoch: int = 1, layers: int = 2, experts: int = 2) -> ExpertMap:
    return ExpertMap(epoch, layers, experts, replicas)


def by_expert(columns: Mapping[int, FakeColumn]) -> tuple[FakeColumn, ...]:
    return tuple(columns[expert] for expert in sorted(columns))
