"""Which replica a batch's rows go to, with what its answers have told; and that no choice changes a bit."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.dispatch.attach import Attacher
from actors.dispatch.lane_transport import LaneMemory
from actors.dispatch.remote_experts import Patience, RemoteExperts
from actors.dispatch.transport import ExpertReply, ExpertRequest, ExpertRows, OpenTransport, WireCounters
from actors.expert.actor import ExpertActor
from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.replica_record import HealthPolicy, State
from cluster.selector import SelectorPolicy
from cluster.service_time import ServiceTime
from cluster.service_times import TimeoutPolicy
from model.dispatch import DispatchPlan, combine, dispatch
from model.numerics import same_bits
from protos import expert_pb2 as pb
from tests.support import expert_process
from tests.support.checkpoints import write_mixtral
from tests.support.engines import Stories, TinyModel, make_engine, request, running, tell
from tests.support.experts import FakeColumn, credentials, map_of, run, served
from tests.support.fake_replicas import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    FakeLanes,
    FakeTransport,
    SplitsEverything,
    actor_arguments,
    entry,
    expected,
    info,
    local,
    plan_of,
    real_plan,
    remote,
    write_model,
)
from tests.support.idle_clock import run_idle

NO_TURNS = HealthPolicy(sample=10**9, timeout=TimeoutPolicy(floor_s=100.0, start_s=100.0, most_s=100.0))
"""Nobody is compared with its siblings, for which they would take turns, or hedged because the machine is busy."""


@asynccontextmanager
async def splitting(
    expert_map: ExpertMap, open_transport: OpenTransport | None = None, **options: Any
) -> AsyncIterator[RemoteExperts]:
    async with remote(expert_map, open_transport, **options) as experts:
        experts._pool._selector = SplitsEverything()
        yield experts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("mixtral"))


@asynccontextmanager
async def choosing(expert_map: ExpertMap, lanes: FakeLanes) -> AsyncIterator[RemoteExperts]:
    async with remote(expert_map, lanes, selector=SelectorPolicy(), health=NO_TURNS) as experts:
        yield experts


def asked(lanes: FakeLanes, name: str) -> list[dict[int, int]]:
    """Rows by expert of each message to a replica."""
    return [{part.expert_id: part.num_rows for part in one.parts} for one in lanes[name].requests]


# ---- who gets what ----------------------------------------------------------------------------------------


def test_a_batch_is_shared_among_replicas_and_small_batches_stay_whole() -> None:
    async def work() -> None:
        lanes, everything = FakeLanes(), [0, 1, 2, 3]
        both = map_of(info("a", everything), info("b", everything), experts=4)
        async with choosing(both, lanes) as experts:
            plan = plan_of([2, 2, 2, 2])
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert (asked(lanes, "a"), asked(lanes, "b")) == ([{0: 2, 2: 2}], [{1: 2, 3: 2}])

    run_idle(work())


def test_the_faster_replica_is_found_and_gets_the_rows() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with choosing(map_of(info("a"), info("b"), experts=1), lanes) as experts:
            lanes["a"].line, lanes["b"].line = ServiceTime(4e-3, 4e-5), ServiceTime(1e-3, 1e-5)
            for step in range(60):
                plan = plan_of([(1, 4, 20)[step % 3]], seed=step)
                assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            slow, fast = experts.times()
            assert (slow.replica_id, fast.replica_id) == ("a", "b")
            assert slow.a_s / fast.a_s == pytest.approx(4, rel=0.2)
            assert slow.calls_total <= 2
            assert slow.calls_total + fast.calls_total == 60
            assert fast.compute_us_total == pytest.approx(1e3 * fast.calls_total + 10 * fast.tokens_total, rel=0.01)

    run_idle(work())


def test_rows_past_the_ridge_are_split_by_speed() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with choosing(map_of(info("a"), info("b"), experts=1), lanes) as experts:
            lanes["a"].line, lanes["b"].line = ServiceTime(1e-3, 1e-4), ServiceTime(1e-3, 3e-4)
            for step in range(40):  # both are busy in turns, so both are measured
                for name in "ab":
                    lanes[name].requests.clear()
                    lanes[name].silent = True
                sizes = (60, 2) if step % 2 else (2, 60)
                rounds = [asyncio.create_task(experts.run(0, plan_of([size], seed=step))) for size in sizes]
                await asyncio.sleep(0)
                for name in "ab":
                    lanes[name].silent = False
                    for which in range(len(lanes[name].requests)):
                        lanes[name].answer(which)
                await asyncio.gather(*rounds)
                for name in "ab":
                    lanes[name].replies.clear()
            for name in "ab":
                lanes[name].requests.clear()
            plan = plan_of([400])
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            (first,), (second,) = asked(lanes, "a"), asked(lanes, "b")
            assert first[0] + second[0] == 400
            assert first[0] / second[0] == pytest.approx(3, rel=0.3)
            rows = [part.rows for name in "ab" for part in lanes[name].requests[0].parts]
            assert rows == [slice(0, first[0]), slice(first[0], 400)]

    run_idle(work())


def test_what_others_have_there_counts_and_is_forgotten() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with choosing(map_of(info("a"), info("b"), experts=1), lanes) as experts:
            for name in "ab":
                lanes[name].line = ServiceTime(1e-3, 1e-5)
            for step in range(10):
                await experts.run(0, plan_of([4], seed=step))
            for name in "ab":
                lanes[name].requests.clear()
            lanes["a"].inflight_tokens = 500
            for step in range(10):
                await experts.run(0, plan_of([4], seed=step))
            assert len(asked(lanes, "a")) <= 1
            assert len(asked(lanes, "b")) >= 9
            lanes["a"].inflight_tokens, lanes["b"].inflight_tokens = 0, 500
            await asyncio.sleep(1.5)  # what was heard fades
            lanes["a"].requests.clear()
            for step in range(10):
                await experts.run(0, plan_of([4], seed=step))
            assert len(asked(lanes, "a")) >= 8

    run_idle(work())


@pytest.mark.parametrize("seed", range(10))
def test_nobody_of_worse_standing_gets_anything(seed: int) -> None:
    async def work() -> None:
        lanes, rng = FakeLanes(), random.Random(seed)
        groups = {name: rng.sample(range(5), 3) for name in "abcdef"} | {"g": range(5)}
        everyone = map_of(*(info(name, held) for name, held in groups.items()), experts=5)
        async with remote(everyone, lanes, selector=SelectorPolicy(message_s=rng.choice([0.0, 1e-3]))) as experts:
            pool = experts._pool
            for _ in range(50):
                for link in pool._links.values():
                    link.record.rank = rng.randrange(3)
                    link.record.state = rng.choice([State.HEALTHY, State.HEALTHY, State.QUARANTINED])
                    link.times.tokens = rng.choice([0, 0, 30])
                counts = [rng.randrange(1, 300) for _ in range(5)]
                starts = [sum(counts[:at]) for at in range(5)]
                parts = [ExpertRows(at, slice(starts[at], starts[at] + counts[at])) for at in range(5)]
                covered: list[int] = []
                for link, batch in pool.choose(1, parts).items():
                    assert [part.rows.start for part in batch] == sorted(part.rows.start for part in batch)
                    for part in batch:
                        covered += range(part.rows.start, part.rows.stop)
                        able = [one for one in pool.named(1, part.expert_id) if one.usable]
                        if link is None:
                            assert not able
                        else:
                            assert link in able
                            assert link.record.rank == min(one.record.rank for one in able)
                assert sorted(covered) == list(range(sum(counts)))

    run_idle(work())


# ---- exactness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", [0, HIDDEN], ids=["grpc", "shm"])
@pytest.mark.parametrize("kernel", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("groups", [[[0, 1, 2, 3]] * 2, [[0, 2], [1, 3], [0, 1, 2, 3]]], ids=["twice", "mixed"])
def test_split_batches_have_the_bits_of_whole_ones(
    model: Path, lane: int, kernel: str, groups: list[list[int]]
) -> None:
    async def work() -> None:
        oracle = local(model, kernel)
        async with AsyncExitStack() as stack:
            replicas = []
            for number, group in enumerate(groups):
                actor = ExpertActor(**actor_arguments(model, f"r{number}", group, kernel))
                await actor.start()
                stack.push_async_callback(actor.stop)
                replicas.append(entry(await actor.wait_settled()))
            async with splitting(map_of(*replicas, experts=EXPERTS), lane=lane, attempt_s=100) as experts:
                parts = 0
                for tokens in (1, 2, 7, 33, 150):
                    for layer in range(LAYERS):
                        plan = real_plan(tokens, seed=tokens)
                        parts += sum(min(count, 2) for count in plan.counts)
                        answers = combine(await experts.run(layer, plan), plan)
                        assert same_bits(answers, combine(oracle.run(layer, plan), plan))
                assert sum(one.calls_total for one in experts.times()) == parts
                assert experts.stats.retries == 0
                assert (experts.stats.wire.merged_messages > 0) == (lane == 0)

    run(work())


def test_only_the_lost_part_of_a_split_expert_is_computed_again() -> None:
    async def work() -> None:
        first, second = FakeColumn(0), FakeColumn(0)
        second.gate.clear()
        async with (
            served(first, experts=[0], replica_id="a") as one,
            served(second, experts=[0], replica_id="b") as two,
            splitting(map_of(one.info(), two.info(), experts=1), attempt_s=100) as experts,
        ):
            plan = plan_of([10])
            running = asyncio.create_task(experts.run(1, plan))
            assert await asyncio.to_thread(second.entered.wait, 100)
            stopping = asyncio.create_task(two.server.stop(0))
            assert torch.equal(await running, expected(plan, 1))
            assert first.calls == [(1, 5), (1, 5)]
            assert experts.stats.retries == 1
            second.gate.set()
            await stopping

    run(work())


def test_only_the_silent_part_of_a_split_expert_is_hedged() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        both = map_of(info("a"), info("b"), experts=1)
        async with splitting(both, lanes, attempt_s=0.05) as experts:
            lanes["b"].silent = True
            plan = plan_of([10])
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert (asked(lanes, "a"), asked(lanes, "b")) == ([{0: 5}, {0: 5}], [{0: 5}])
            assert lanes["a"].requests[1].parts[0].rows == slice(5, 10)
            assert experts.stats.hedges == 1

    run_idle(work())


@pytest.mark.parametrize("lane", [0, HIDDEN], ids=["grpc", "shm"])
def test_a_process_killed_with_parts_of_every_expert_changes_no_bit(model: Path, lane: int) -> None:
    async def work() -> None:
        oracle = local(model, "fp16")
        async with (
            processes(model, a=0.0, b=100.0) as (spawned, replicas),
            splitting(map_of(*replicas, experts=EXPERTS), lane=lane, attempt_s=100) as experts,
        ):
            plan = real_plan(60, seed=1)
            running = asyncio.create_task(experts.run(0, plan))
            done, _ = await asyncio.wait({running}, timeout=0.1)  # each call of b takes longer than this test may
            assert not done
            spawned["b"].kill()
            assert same_bits(combine(await running, plan), combine(oracle.run(0, plan), plan))
            assert experts.stats.retry_reasons["CONNECTION"] >= 1
            first, second = experts.times()
            assert (first.tokens_total, second.tokens_total) == (120, 0)
            assert first.calls_total == 8, "its own parts of four experts, and those that were lost"

    run(work())


# ---- real processes of unequal speed ----------------------------------------------------------------------


@asynccontextmanager
async def processes(
    model: Path, *, say_so: bool = False, **call_s: float
) -> AsyncIterator[tuple[dict[str, asyncio.subprocess.Process], list[ReplicaInfo]]]:
    """Processes by name that hold everything; each call takes so much longer, or just that by their own account."""
    everything = list(range(EXPERTS))
    arguments = [actor_arguments(model, name, everything) | {"call_s": longer} for name, longer in call_s.items()]
    for one in arguments:
        one |= {"says_s": one["call_s"]} if say_so else {}
    started = await asyncio.gather(*(expert_process.spawn(**one) for one in arguments))
    try:
        spawned = dict(zip(call_s, (process for process, _ in started), strict=True))
        yield spawned, [entry(facts) for _, facts in started]
    finally:
        for process, _ in started:
            await expert_process.end(process)


@asynccontextmanager
async def coordinators(num: int, replicas: list[ReplicaInfo], lane: bool) -> AsyncIterator[list[RemoteExperts]]:
    """So many, each with a seat and connections of its own."""
    patience = Patience(deadline_s=120, health=NO_TURNS)
    async with AsyncExitStack() as stack:
        made = []
        for seat in range(num):
            lanes = LaneMemory.create(1024, HIDDEN, 1024) if lane else None
            experts = RemoteExperts(Attacher(credentials(), lanes, lane_only=lane), patience, lanes=lanes, seat=seat)
            stack.push_async_callback(experts.close)
            experts.apply_map(map_of(*replicas, experts=EXPERTS))
            await experts.wait_ready(100, all_replicas=True)
            made.append(experts)
        yield made


def plan_for_one_expert() -> DispatchPlan:
    """Eight rows, all for expert 0."""
    x_TD = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(0))
    return dispatch(x_TD, torch.tensor([[9.0, 0.0, 0.0, 0.0]]).expand(8, -1), 1)


@pytest.mark.parametrize("lane", [False, True], ids=["grpc", "shm"])
def test_of_real_processes_the_faster_one_is_found(model: Path, lane: bool) -> None:
    async def work() -> None:
        oracle, plan = local(model, "fp16"), plan_for_one_expert()
        right = combine(oracle.run(0, plan), plan)
        async with (
            processes(model, a=1.0, b=0.003) as (_, replicas),
            coordinators(1, replicas, lane) as (experts,),
        ):
            was_busy = False
            for _ in range(30):
                assert same_bits(combine(await experts.run(0, plan), plan), right)
                slow, fast = experts.times()
                was_busy = was_busy or slow.busy_share > 0
            assert fast.calls_total >= 25
            assert slow.a_s > 3 * fast.a_s
            assert was_busy

    run(work())


def test_real_coordinators_do_not_all_use_the_same_process(model: Path) -> None:
    """Over gRPC: who waits for a same-node lane does so outside the event loop, and these two share one.

    By their own account both processes are equally quick: of a busy machine the one that it has left behind is not.
    """

    async def work() -> None:
        oracle, plan = local(model, "fp16"), plan_for_one_expert()
        right = combine(oracle.run(0, plan), plan)

        async def go(experts: RemoteExperts) -> None:
            for _ in range(40):
                assert same_bits(combine(await experts.run(0, plan), plan), right)

        async with (
            processes(model, say_so=True, a=0.01, b=0.01) as (_, replicas),
            coordinators(2, replicas, False) as both,
        ):
            await asyncio.gather(*map(go, both))
            served_by = [[one.calls_total for one in experts.times()] for experts in both]
            assert [sum(calls) for calls in served_by] == [40, 40]
            assert all(16 <= sum(of_one) <= 64 for of_one in zip(*served_by, strict=True)), served_by

    run(work())


# ---- load -------------------------------------------------------------------------------------------------


class ModelTransport(FakeTransport):
    """Answers with a model's own experts."""

    def __init__(self, replica: ReplicaInfo, model: TinyModel) -> None:
        super().__init__(replica)
        self.computes = {column.expert: column for column in model.local._columns.values()}

    def fine(self, asked: ExpertRequest) -> ExpertReply:
        answers = [self.computes[one.expert_id].forward(asked.layer_id, asked.x_ND[one.rows]) for one in asked.parts]
        return ExpertReply(pb.STATUS_OK, "", torch.cat(answers), compute_us=100)


def test_the_routers_load_counts_each_row_once_whatever_becomes_of_it(tmp_path: Path) -> None:
    """Split, refused, sent again, hedged: the load is the router's; what was computed is another sum."""

    async def work() -> None:
        write_mixtral(tmp_path, layers=2, experts=2, top_k=2)
        model = TinyModel.load(tmp_path)
        made: dict[str, ModelTransport] = {}

        async def attach(replica: ReplicaInfo, _counters: WireCounters, _timeout_s: float) -> ModelTransport:
            return made.setdefault(replica.replica_id, ModelTransport(replica, model))

        prompts = [[5, 6, 7, 8, 9], [11, 12, 13]]
        asked_for = [request(prompt, max_tokens=6) for prompt in prompts]
        plain = make_engine(model, quiet := Stories())
        async with running(plain):
            right = [story.exact for story in await tell(plain, quiet, asked_for)]

        both = map_of(info("a", [0, 1]), info("b", [0, 1]))
        async with splitting(both, attach, attempt_s=0.05) as experts:
            engine = make_engine(model, stories := Stories(), experts=experts)
            made["a"].refuse = [pb.STATUS_OVERLOADED, pb.STATUS_CORRUPT]
            async with running(engine):
                told = asyncio.create_task(tell(engine, stories, asked_for))
                await made["a"].arrived.acquire()
                made["b"].silent = True
                while not experts.stats.hedges:
                    await asyncio.wait({told}, timeout=0.01)
                made["b"].silent = False
                assert [story.exact for story in await told] == right
            assert experts.stats.retries >= 2
            assert experts.stats.hedges >= 1
            routed = sum(len(prompt) + 5 for prompt in prompts)
            assert engine.load.total.tolist() == plain.load.total.tolist()
            assert engine.load.total.sum(axis=1).tolist() == [2 * routed] * 2
            computed = sum(one.tokens_total for one in experts.times())
            assert computed == 2 * 2 * routed, "refused rows were not computed, and the silent one never said so"

    run_idle(work())
