"""A replica whose canary changes leaves at once; while all is well its canaries cost little and cover everything."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from actors.dispatch.attach import Attacher
from actors.dispatch.lane_transport import LaneMemory
from actors.dispatch.remote_experts import Patience, RemoteExperts
from actors.dispatch.transport import (
    ExpertReply,
    ExpertRequest,
    ExpertRows,
    ExpertTransport,
    PendingReply,
    TransportError,
    WireCounters,
)
from actors.expert.actor import ExpertActor
from actors.expert.canary import BUSY_SHARE, IDLE_SHARE, PASS_S, Canaries, pause_s
from actors.expert.compute_thread import ComputeThread
from actors.expert.replica import ExpertReplica
from cluster.expert_map import ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from model.dispatch import combine, dispatch
from model.experts import ExpertColumn, LocalExperts
from model.numerics import same_bits
from model.storage.checkpoint import Checkpoint
from protos import expert_pb2 as pb
from protos.expert_pb2 import REPLICA_STATE_FAILED, REPLICA_STATE_READY
from tests.support import expert_process
from tests.support.checkpoints import write_mixtral
from tests.support.experts import FAR_FUTURE_US, TOKEN, WIDTH, FakeColumn, channel_to, credentials, map_of, run, served
from tests.support.process_memory import find, first_bytes, flip, inverted


async def until(true: Callable[[], bool]) -> None:
    """For what happens in the compute thread and nothing tells of; bounded by the test's own time."""
    while True:
        if true():
            return
        await asyncio.sleep(0.001)


class Watched:
    """A replica of fake columns with canaries, on a compute thread of its own."""

    def __init__(self, *columns: FakeColumn, pass_s: float = 0.01, patience_s: float = 1.0) -> None:
        self.replica = ExpertReplica("replica", tuple(column.expert for column in columns), range(2))
        self.compute = ComputeThread("replica", 1)
        self.failures = 0
        self.canaries = Canaries(self.replica, self.compute, self._failed, pass_s=pass_s, patience_s=patience_s)
        self.columns = columns

    def _failed(self) -> None:
        self.failures += 1

    async def __aenter__(self) -> "Watched":
        self.compute.start()
        for column in self.columns:
            self.replica.add(column.expert, column)
            await self.canaries.learn(column.expert, column)
        self.replica.settle(REPLICA_STATE_READY)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.compute.stop()


def test_a_changed_answer_ends_the_watch_and_the_replica() -> None:
    async def work() -> None:
        columns = (FakeColumn(0), FakeColumn(3))
        async with Watched(*columns) as there:
            watch = asyncio.create_task(there.canaries.watch())
            await until(lambda: there.replica.counters.canaries_total >= 9)
            assert there.replica.state == REPLICA_STATE_READY
            columns[1].canaries[1] = b"another"
            await watch
            assert there.replica.state == REPLICA_STATE_FAILED
            assert there.replica.detail.startswith("quarantined: canary of expert 3, layer 1: the answer to known rows")
            assert there.failures == 1

    run(work())


def test_every_layer_of_every_expert_is_found_out_within_one_pass() -> None:
    async def work() -> None:
        for expert in (0, 3):
            for layer in (0, 1):
                columns = (FakeColumn(0), FakeColumn(3))
                async with Watched(*columns) as there:
                    {0: columns[0], 3: columns[1]}[expert].canaries[layer] = b"another"
                    await there.canaries.watch()
                    assert f"canary of expert {expert}, layer {layer}:" in there.replica.detail
                    assert there.replica.counters.canaries_total <= 4

    run(work())


def test_a_canary_that_raises_condemns_the_replica_too() -> None:
    class Broken(FakeColumn):
        def canary(self, layer: int) -> bytes:
            if self.canaries:
                raise RuntimeError("device-side assert")
            return b"as ever"

    async def work() -> None:
        column = Broken(0)
        async with Watched(column) as there:
            column.canaries[0] = b""
            await there.canaries.watch()
            assert "quarantined: canary of expert 0, layer 0: RuntimeError: device-side assert" in there.replica.detail
            assert there.compute.failures == 0

    run(work())


def test_rows_go_before_a_canary_and_yet_it_gets_its_turn() -> None:
    """Among jobs that never end it waits for `patience_s`, and then is the next."""

    async def work() -> None:
        async with Watched(FakeColumn(0), patience_s=200.0) as there:
            order: list[str] = []
            gate = threading.Event()
            there.compute.submit(lambda: bool(gate.wait(200)), 1)
            looked = asyncio.create_task(there.canaries.check(0, 0))
            await asyncio.sleep(0)
            there.compute.submit(lambda: order.append(f"rows after {there.replica.counters.canaries_total}"), 2**62)
            gate.set()
            await looked
            assert order == ["rows after 0"]
            assert there.replica.counters.canaries_total == 1

        async with Watched(FakeColumn(0), patience_s=0.05) as there:
            ended = threading.Event()

            def again() -> None:
                if not ended.is_set():
                    there.compute.submit(again, 2**62)

            again()
            await there.canaries.check(1, 0)
            ended.set()
            assert there.replica.counters.canaries_total == 1

    run(work())


def test_the_pace_covers_all_in_a_pass_and_keeps_to_its_share() -> None:
    assert pause_s(30, 0.001, busy=True) == PASS_S / 30
    assert pause_s(30, 0.1, busy=True) == pytest.approx(0.1 / BUSY_SHARE)
    assert pause_s(30, 0.1, busy=False) == pytest.approx(0.1 / IDLE_SHARE)
    demo_cost_s = 0.003  # three times what is measured on the demo model
    assert 30 * (pause_s(30, demo_cost_s, busy=False) + demo_cost_s) < 30
    for cost_s in (0.0001, 0.01, 1.0):
        for canaries in (1, 30, 240):
            assert cost_s / (pause_s(canaries, cost_s, busy=True) + cost_s) <= BUSY_SHARE


def test_whoever_waits_for_a_condemned_replica_hears_of_it_at_once() -> None:
    """By lane and by gRPC: of what it had in its queue nothing is answered, and nobody is let in again."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        column = FakeColumn(0)
        async with served(column, experts=[0]) as there, contextlib.AsyncExitStack() as stack:
            mine = LaneMemory.create(64, WIDTH, 64)
            stack.callback(mine.close)
            transports: list[ExpertTransport] = []
            for lanes in (mine, None):
                transports.append(await Attacher(credentials(), lanes)(there.info(), WireCounters(), 120))
                stack.push_async_callback(transports[-1].close)
            assert [transport.lane for transport in transports] == ["shm", "grpc"]

            def quarantine() -> None:
                there.lanes.end_all(there.replica.detail)
                loop.call_soon_threadsafe(there.service.break_off, there.replica.detail)

            canaries = Canaries(there.replica, there.compute, quarantine)
            await canaries.learn(0, column)
            column.canaries[1] = b"another"
            gate = threading.Event()
            there.compute.submit(lambda: bool(gate.wait(200)))
            waiting = [transport.forward(question()) for transport in transports[1:] for _ in range(3)]
            await until(lambda: there.replica.inflight_tokens == 3)  # taken in while the compute thread is busy
            waiting.append(transports[0].forward(question()))
            there.compute.submit(lambda: canaries._look(1, 0))
            gate.set()
            outcomes = [await _outcome(reply) for reply in waiting]
            assert all(isinstance(one, TransportError) or one.status == pb.STATUS_NOT_HELD for one in outcomes)
            assert column.calls == []
            for transport in transports:
                await transport.closed.wait()
            assert "quarantined: canary of expert 0, layer 1" in transports[1].reason
            with pytest.raises(TransportError, match="quarantined: canary of expert 0, layer 1"):
                await Attacher(credentials(), mine)(there.info(), WireCounters(), 120)
            await until(lambda: there.replica.inflight_tokens == 0)
            assert there.compute.failures == 0

    run(work())


def question() -> ExpertRequest:
    return ExpertRequest(1, 1, FAR_FUTURE_US, (ExpertRows(0, slice(0, 1)),), torch.ones(1, WIDTH))


async def _outcome(reply: PendingReply) -> ExpertReply | TransportError:
    await reply.wait()
    return reply.outcome()


def test_a_new_stream_to_a_condemned_replica_is_told_why() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, channel_to(there.server.address) as channel:
            there.replica.fail("quarantined: for a test")
            there.service.break_off(there.replica.detail)
            call = channel.stream_stream("/octavo.ExpertService/Forward")()
            with pytest.raises(grpc.aio.AioRpcError, match="quarantined: for a test") as caught:
                await call.read()
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

    run(work())


# ---- real weights -----------------------------------------------------------------------------------------

HIDDEN, LAYERS, EXPERTS = 32, 3, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    write_mixtral(path, hidden=HIDDEN, ffn=48, layers=LAYERS, experts=EXPERTS, dtype=torch.float16)
    return path


def arguments(model: Path, replica_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "replica_id": replica_id,
        "expert_ids": list(range(EXPERTS)),
        "first_layer": 0,
        "num_layers": LAYERS,
        "model": str(model),
        "kernel": "fp16",
        "device": "cpu",
        "auth_token": TOKEN,
        **changes,
    }


def test_an_actor_watches_over_what_it_holds(model: Path) -> None:
    """A column that was loaded later, too."""

    async def work() -> None:
        actor = ExpertActor(**arguments(model, "r", expert_ids=[0], canary_pass_s=0.01))
        address = await actor.start()
        try:
            assert (await actor.wait_settled())["canaries_total"] == 0
            async with channel_to(address) as channel:
                load = channel.unary_unary(
                    "/octavo.ExpertService/LoadColumn",
                    pb.LoadColumnRequest.SerializeToString,
                    pb.LoadColumnReply.FromString,
                )
                assert (await load(pb.LoadColumnRequest(expert_id=1, num_layers=LAYERS))).status == pb.STATUS_OK
            await until(lambda: actor._replica.counters.canaries_total >= 2 * EXPERTS * LAYERS)
            info = await actor.info()
            assert (info["state"], info["errors_total"]) == ("ready", 0)
            assert info["canary_us_total"] > 0
            later = actor._replica.find(2, 1)
            assert isinstance(later, ExpertColumn)
            spoil(model, later, 2)
            await until(lambda: actor._replica.state != REPLICA_STATE_READY)
            info = await actor.info()
            assert info["state"] == "failed"
            assert info["detail"].startswith("quarantined: canary of expert 1, layer 2: ")
        finally:
            await actor.stop()

    run(work())


def spoil(model: Path, column: ExpertColumn, layer: int) -> None:
    """One bit of its packed weights."""
    weight = Checkpoint.open(model).read(f"layers.{layer}.experts.{column.expert}.w1")
    before = column.canary(layer)
    pattern = first_bytes("fp16", weight)
    inverse = inverted(pattern)
    for place in find(pattern):
        flip(place, 3, unless_not=inverse)
    assert column.canary(layer) != before


@pytest.mark.parametrize("lane", [0, HIDDEN], ids=["grpc", "shm"])
def test_a_bit_that_flips_in_the_memory_of_a_serving_process_is_found_and_nothing_fails(model: Path, lane: int) -> None:
    """Two replicas under load. Answers between the flip and the canary may be wrong; none after it is."""

    async def work() -> None:
        names = ("a", "b")
        started = await asyncio.gather(
            *(expert_process.spawn(**arguments(model, name, canary_pass_s=0.5)) for name in names)
        )
        torch.set_num_threads(1)
        checkpoint = Checkpoint.open(model)
        oracle = LocalExperts([ExpertColumn.load(checkpoint, e, range(LAYERS), "fp16", "cpu") for e in range(EXPERTS)])
        lanes = LaneMemory.create(1024, HIDDEN, 1024) if lane else None
        experts = RemoteExperts(Attacher(credentials(), lanes, lane_only=bool(lane)), Patience(120.0), lanes=lanes)
        try:
            experts.apply_map(map_of(*(entry(facts) for _, facts in started), layers=LAYERS, experts=EXPERTS))
            await experts.wait_ready(120, all_replicas=True)

            async def ask(seed: int) -> bool:
                generator = torch.Generator().manual_seed(seed)
                plan = dispatch(
                    torch.randn(5, HIDDEN, generator=generator), torch.randn(5, EXPERTS, generator=generator), 2
                )
                answers = [combine(await experts.run(layer, plan), plan) for layer in range(LAYERS)]
                return all(
                    same_bits(answer, combine(oracle.run(layer, plan), plan)) for layer, answer in enumerate(answers)
                )

            for seed in range(20):
                assert await ask(seed)
            process, facts = started[0]
            weight = checkpoint.read("layers.1.experts.1.w1")
            places = find(first_bytes("fp16", weight), process.pid)
            assert places
            for place in places:
                flip(place, 14, process.pid)  # of the first weight, the highest bit of the exponent
            flipped_s = time.monotonic()
            async with channel_to(facts["address"]) as channel:
                seed = 100
                while (about := await info(channel)).state == pb.REPLICA_STATE_READY:
                    await ask(seed)  # never raises, whatever its rows are
                    seed += 1
            assert about.detail.startswith("quarantined: canary of expert 1, layer 1: "), about.detail
            assert time.monotonic() - flipped_s < 60
            for seed in range(1000, 1040):
                assert await ask(seed)
        finally:
            await experts.close()
            if lanes is not None:
                lanes.close()
            for process, _ in started:
                await expert_process.end(process)

    run(work())


async def info(channel: grpc.aio.Channel) -> pb.InfoReply:
    ask: Any = channel.unary_unary(
        "/octavo.ExpertService/Info", pb.InfoRequest.SerializeToString, pb.InfoReply.FromString
    )
    reply: pb.InfoReply = await ask(pb.InfoRequest())
    return reply


def entry(facts: dict[str, Any]) -> ReplicaInfo:
    return ReplicaInfo(
        replica_id=ReplicaId(facts["replica_id"]),
        expert_ids=tuple(ExpertId(expert) for expert in facts["expert_ids"]),
        first_layer=LayerId(0),
        num_layers=LAYERS,
        address=facts["address"],
        node_id=NodeId("node"),
        numerics_domain=facts["numerics_domain"],
    )
