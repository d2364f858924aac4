"""Replicas without sockets, and maps, plans and oracles, for tests of how a coordinator asks its experts."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from actors.dispatch.attach import Attacher
from actors.dispatch.lane_transport import LaneMemory
from actors.dispatch.remote_experts import Patience, RemoteExperts
from actors.dispatch.transport import (
    ExpertReply,
    ExpertRequest,
    OpenTransport,
    PendingReply,
    TransportError,
    WireCounters,
)
from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from cluster.replica_record import HealthPolicy
from cluster.selector import Parts, Selector, SelectorPolicy, Server
from cluster.service_time import ServiceTime
from cluster.service_times import TimeoutPolicy
from model.dispatch import DispatchPlan, dispatch
from model.experts import ExpertColumn, LocalExperts
from model.storage.checkpoint import Checkpoint
from protos import expert_pb2 as pb
from tests.support.checkpoints import write_mixtral
from tests.support.experts import TOKEN, WIDTH, answer, credentials

HIDDEN, LAYERS, EXPERTS = 32, 2, 4

TOGETHER = SelectorPolicy(message_s=10.0)
"""For tests of what becomes of a message: all that one replica can have goes to one replica."""


class SplitsEverything(Selector):
    """Every expert in even parts to all that hold it, whether that pays or not."""

    def assign(self, rows: Sequence[int], holders: Sequence[Sequence[Server]]) -> list[Parts]:
        return [
            tuple((at, num // len(who) + (at < num % len(who))) for at in range(min(num, len(who))))
            for num, who in zip(rows, holders, strict=True)
        ]


class TheFirst(Selector):
    """Everything to the first that can be asked, however quick it has seemed."""

    def assign(self, rows: Sequence[int], holders: Sequence[Sequence[Server]]) -> list[Parts]:
        return [((0, num),) for num in rows]


def plan_of(counts: Sequence[int], seed: int = 0) -> DispatchPlan:
    """Rows for each expert, each of a token of its own."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(sum(counts), WIDTH, generator=generator)
    tokens_N = torch.arange(sum(counts))
    return DispatchPlan(x_ND, tokens_N, tuple(counts), tokens_N[:, None], torch.ones(sum(counts), 1))


def expected(plan: DispatchPlan, layer: int) -> torch.Tensor:
    pieces = [answer(expert, layer, plan.x_ND[plan.rows(expert)]) for expert in range(len(plan.counts))]
    return torch.cat(pieces)


@asynccontextmanager
async def remote(
    expert_map: ExpertMap | None,
    open_transport: OpenTransport | None = None,
    *,
    lane: int = 0,
    selector: SelectorPolicy = TOGETHER,
    **patience: Any,
) -> AsyncIterator[RemoteExperts]:
    """With `lane`, rows of so many elements go by the same-node lane and by nothing else.

    `attempt_s` is when an answer is overdue, whatever was measured before.
    """
    if "attempt_s" in patience:
        attempt_s = patience.pop("attempt_s")
        timeout = TimeoutPolicy(floor_s=attempt_s, start_s=attempt_s, most_s=attempt_s)
        patience["health"] = HealthPolicy(timeout=timeout)
    lanes = LaneMemory.create(1024, lane, 1024) if lane else None
    attach = open_transport or Attacher(credentials(), lanes, lane_only=lanes is not None)
    experts = RemoteExperts(attach, Patience(**{"deadline_s": 120.0, **patience}), lanes=lanes, selector=selector)
    try:
        if expert_map is not None:
            experts.apply_map(expert_map)
            await experts.wait_ready(120, all_replicas=True)
        yield experts
    finally:
        await experts.close()


class FakeTransport:
    """A connection without sockets: answers by itself, or as told."""

    def __init__(self, replica: ReplicaInfo, lane: str = "fake") -> None:
        self.lane = lane
        self.incarnation = f"process of {replica.address}"
        self.closed = asyncio.Event()
        self.reason = ""
        self.replica = replica
        self.refuse: list[pb.Status] = []
        self.malformed = False
        self.silent = False
        self.line = ServiceTime(3e-6, 0.0)
        """How long a call takes, by its own account."""
        self.inflight_tokens = 0
        """Everybody's after each answer."""
        self.twist: Callable[[torch.Tensor], torch.Tensor] | None = None
        """What becomes of its answers, which were right before."""
        self.arrived = asyncio.Semaphore(0)
        self.requests: list[ExpertRequest] = []
        self.replies: list[PendingReply] = []

    def forward(self, request: ExpertRequest) -> PendingReply:
        reply = PendingReply()
        self.arrived.release()
        self.requests.append(request)
        self.replies.append(reply)
        if self.refuse:
            reply.end(ExpertReply(self.refuse.pop(0), "as told"))
        elif self.malformed:
            reply.end(ExpertReply(pb.STATUS_INVALID, "3 rows came back for 2", malformed=True))
        elif not self.silent:
            reply.end(self.fine(request))
        return reply

    def fine(self, request: ExpertRequest) -> ExpertReply:
        pieces = [answer(part.expert_id, request.layer_id, request.x_ND[part.rows]) for part in request.parts]
        output = torch.cat(pieces)
        output = output if self.twist is None else self.twist(output)
        seconds = sum(self.line.seconds(part.num_rows) for part in request.parts)
        return ExpertReply(
            pb.STATUS_OK,
            "",
            output,
            compute_us=round(1e6 * seconds),
            queue_us=2,
            inflight_tokens=self.inflight_tokens,
        )

    def answer(self, which: int = -1) -> None:
        """Answers what it was asked while it was silent."""
        self.replies[which].end(self.fine(self.requests[which]))

    def fail(self, reason: str = "cut") -> None:
        self.reason = reason
        self.closed.set()
        for reply in self.replies:
            reply.end(TransportError(reason))

    async def close(self) -> None:
        self.fail("closed here")


class FakeLanes:
    """Makes FakeTransports and remembers them, newest last, by replica."""

    def __init__(self) -> None:
        self.made: dict[str, list[FakeTransport]] = {}
        self.unreachable: set[str] = set()
        self.shared: set[str] = set()
        """Replicas that say they are on this machine."""
        self.restarted: set[str] = set()
        """Replicas whose next connections are to another process."""

    async def __call__(self, replica: ReplicaInfo, _counters: WireCounters, _timeout_s: float) -> FakeTransport:
        if replica.replica_id in self.unreachable:
            raise TransportError("unreachable as told")
        transport = FakeTransport(replica, "shm" if replica.replica_id in self.shared else "fake")
        if replica.replica_id in self.restarted:
            transport.incarnation += ", the second"
        self.made.setdefault(replica.replica_id, []).append(transport)
        return transport

    def __getitem__(self, replica_id: str) -> FakeTransport:
        return self.made[replica_id][-1]


def info(replica_id: str, experts: Sequence[int] = (0,), address: str = "") -> ReplicaInfo:
    return ReplicaInfo(
        replica_id=ReplicaId(replica_id),
        expert_ids=tuple(ExpertId(expert) for expert in experts),
        first_layer=LayerId(0),
        num_layers=2,
        address=address or f"{replica_id}:1",
        node_id=NodeId("node"),
        numerics_domain="fake",
    )


def write_model(path: Path) -> Path:
    write_mixtral(path, hidden=HIDDEN, ffn=48, layers=LAYERS, experts=EXPERTS, dtype=torch.float16)
    return path


def actor_arguments(model: Path, replica_id: str, experts: Sequence[int], kernel: str = "auto") -> dict[str, Any]:
    return {
        "replica_id": replica_id,
        "expert_ids": list(experts),
        "first_layer": 0,
        "num_layers": LAYERS,
        "model": str(model),
        "kernel": kernel,
        "device": "cpu",
        "auth_token": TOKEN,
    }


def entry(facts: dict[str, Any]) -> ReplicaInfo:
    """A settled actor's entry in a map."""
    assert facts["state"] == "ready", facts["detail"]
    made = info(facts["replica_id"], facts["expert_ids"], facts["address"])
    return replace(made, numerics_domain=facts["numerics_domain"])


def local(model: Path, kernel: str) -> LocalExperts:
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(model)
    columns = [ExpertColumn.load(checkpoint, e, range(LAYERS), kernel, "cpu") for e in range(EXPERTS)]
    return LocalExperts(columns)


def real_plan(tokens: int, seed: int = 0) -> DispatchPlan:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, HIDDEN, generator=generator) * 2
    return dispatch(x_TD, torch.randn(tokens, EXPERTS, generator=generator), 2)
