"""Real expert processes, frozen, continued and killed under traffic: every answer keeps its bits, nothing is leaked."""

import asyncio
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from actors.dispatch.attach import Attacher
from actors.dispatch.lane_transport import LaneMemory
from actors.dispatch.remote_experts import Patience, RemoteExperts
from cluster.replica_record import HealthPolicy
from cluster.service_times import TimeoutPolicy
from model.dispatch import DispatchPlan, combine
from model.numerics import same_bits
from tests.support import expert_process
from tests.support.experts import credentials, map_of, run
from tests.support.fake_replicas import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    SplitsEverything,
    actor_arguments,
    entry,
    local,
    real_plan,
    write_model,
)

GROUPS = {"a": [0, 1], "b": [0, 1], "c": [2, 3]}
ROWS = 160  # few: what a frozen process might still read or write would soon be used again


@dataclass
class Traffic:
    """Steps of several sizes whose answers are known; raises when one differs."""

    experts: RemoteExperts
    processes: dict[str, Process]
    plans: list[DispatchPlan]
    wanted: list[list[torch.Tensor]]

    async def step(self, number: int) -> None:
        plan, wanted = self.plans[number % len(self.plans)], self.wanted[number % len(self.plans)]
        for layer in range(LAYERS):
            assert same_bits(combine(await self.experts.run(layer, plan), plan), wanted[layer]), (number, layer)
        await asyncio.sleep(0)

    async def steps(self, count: int) -> None:
        for number in range(count):
            await self.step(number)

    async def until(self, holds: Callable[[], bool]) -> None:
        number = 0
        while not holds():
            await self.step(number)
            number += 1

    async def freeze_while_asked(self, name: str) -> None:
        """Until it is ejected and another was asked in its place. Who seemed slow may not be asked at all: then its
        connection is lost first, or it was ejected before.
        """
        for _ in range(10):
            hedges = self.experts.stats.hedges
            await expert_process.freeze(self.processes[name])
            await self.until(lambda: self.state(name) in ("ejected", "away"))
            if self.state(name) == "ejected" and self.experts.stats.hedges > hedges:
                return
            self.send(name, signal.SIGCONT)
            await self.until(lambda: self.state(name) == "healthy")
            await self.steps(40)
        raise AssertionError(f"{name} was never asked while it was frozen")

    def send(self, name: str, what: signal.Signals) -> None:
        self.processes[name].send_signal(what)

    def state(self, name: str) -> str:
        return next(one.state for one in self.experts.standings() if one.replica_id == name)


@asynccontextmanager
async def traffic(model: Path, lane: bool, policy: HealthPolicy | None = None) -> AsyncIterator[Traffic]:
    oracle = local(model, "fp16")
    plans = [real_plan(tokens, seed=tokens) for tokens in (1, 5, 20, 33)]
    wanted = [[combine(oracle.run(layer, plan), plan) for layer in range(LAYERS)] for plan in plans]
    started = await asyncio.gather(
        *(expert_process.spawn(**actor_arguments(model, name, held)) for name, held in GROUPS.items())
    )
    processes = {name: process for name, (process, _) in zip(GROUPS, started, strict=True)}
    memory = LaneMemory.create(ROWS, HIDDEN, ROWS) if lane else None
    patience = Patience(deadline_s=120, health=policy or HealthPolicy())
    experts = RemoteExperts(Attacher(credentials(), memory, lane_only=lane), patience, lanes=memory)
    try:
        experts.apply_map(map_of(*(entry(facts) for _, facts in started), experts=EXPERTS))
        await experts.wait_ready(120, all_replicas=True)
        yield Traffic(experts, processes, plans, wanted)
    finally:
        await experts.close()
        for process in processes.values():
            await expert_process.end(process)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize("lane", [False, True], ids=["grpc", "shm"])
def test_a_frozen_replica_is_hedged_ejected_and_taken_back_and_no_bit_changes(model: Path, lane: bool) -> None:
    async def work() -> None:
        async with traffic(model, lane) as under:
            stats = under.experts.stats
            await under.steps(40)
            await under.freeze_while_asked("a")
            assert stats.hedges >= 1
            before = stats.calls, stats.hedges
            await under.steps(100)
            assert stats.hedges - before[1] <= 1, "who is ejected costs nothing any more, but a probe now and then"
            link = under.experts._pool.named(0, 0)[0]
            under.send("a", signal.SIGCONT)  # what it was asked before, it answers now, if it is still connected
            await under.until(lambda: link.unanswered == 0)
            await under.steps(200)
            await under.until(lambda: under.state("a") == "healthy")
            await under.steps(40)
            assert stats.mismatches == 0
            budget = under.experts._pool.book.budget
            assert budget.extra <= budget.burst + budget.share * budget.calls
            if under.experts._lanes is not None:
                assert under.experts._lanes.rows._space.num_taken == 0

    run(work())


@pytest.mark.parametrize("lane", [False, True], ids=["grpc", "shm"])
def test_a_replica_killed_with_rows_in_its_hands_is_replaced_at_once(model: Path, lane: bool) -> None:
    async def work() -> None:
        # nobody is hedged, and "a" has a part as long as it lives: replaying needs no leave
        patient = TimeoutPolicy(floor_s=20.0, start_s=20.0)
        policy = HealthPolicy(timeout=patient, sample=1 << 20, hedge_burst=0, hedge_share=0.0)
        async with traffic(model, lane, policy) as under:
            under.experts._pool._selector = SplitsEverything()
            await under.steps(20)
            await expert_process.freeze(under.processes["a"])  # it will have the rows, and not answer them
            running = asyncio.create_task(under.step(2))
            await asyncio.wait({running}, timeout=0.01)
            under.send("a", signal.SIGKILL)
            await running
            await under.steps(40)
            assert under.experts.stats.retry_reasons["CONNECTION"] >= 1
            assert under.state("a") == "away"
            assert under.experts.stats.hedges == 0

    run(work())
