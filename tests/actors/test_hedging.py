"""Somebody slow is hedged, ejected, probed and taken back; somebody wrong is found out; no answer changes."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from actors.dispatch.attach import Attacher
from actors.dispatch.lane_transport import LaneMemory
from actors.dispatch.remote_experts import ExpertUnavailable, Patience, RemoteExperts
from actors.dispatch.transport import ExpertRows
from cluster.expert_map import ExpertMap
from cluster.replica_record import HealthPolicy, State
from cluster.selector import SelectorPolicy
from cluster.service_times import SIZES, TimeoutPolicy
from model.dispatch import DispatchPlan, combine, dispatch
from model.numerics import same_bits
from tests.support.experts import WIDTH, FakeColumn, answer, credentials, map_of, run, served
from tests.support.fake_replicas import TOGETHER, FakeLanes, expected, info, plan_of
from tests.support.idle_clock import run_idle

ATTEMPT_S = 0.05
NAN, INF = float("nan"), float("inf")


def policy(**fields: Any) -> HealthPolicy:
    return HealthPolicy(timeout=TimeoutPolicy(floor_s=ATTEMPT_S, start_s=ATTEMPT_S, most_s=ATTEMPT_S), **fields)


@asynccontextmanager
async def fakes(expert_map: ExpertMap, **fields: Any) -> AsyncIterator[tuple[RemoteExperts, FakeLanes]]:
    """`fields` go to HealthPolicy."""
    lanes = FakeLanes()
    experts = RemoteExperts(lanes, Patience(deadline_s=120.0, health=policy(**fields)), selector=TOGETHER)
    try:
        experts.apply_map(expert_map)
        await experts.wait_ready(120, all_replicas=True)
        yield experts, lanes
    finally:
        await experts.close()


def pair(experts: int = 1) -> ExpertMap:
    """Two replicas of everything."""
    return map_of(info("a", range(experts)), info("b", range(experts)), experts=experts)


async def run_for(experts: RemoteExperts, seconds: float, plan: DispatchPlan) -> None:
    """A round of layer 0 that nobody waits for any longer."""
    await experts.start(0, plan, asyncio.get_running_loop().time() + seconds).result()


def states(experts: RemoteExperts) -> dict[str, str]:
    return {one.replica_id: one.state for one in experts.standings()}


def asked(lanes: FakeLanes, name: str) -> list[list[int]]:
    """Rows per expert of each message to a replica."""
    return [[part.num_rows for part in request.parts] for request in lanes[name].requests]


# ---- hedges -----------------------------------------------------------------------------------------------


def test_all_that_a_message_has_not_brought_goes_to_the_next_replica_together() -> None:
    async def work() -> None:
        async with fakes(pair(3)) as (experts, lanes):
            lanes["a"].silent = True
            plan = plan_of([2, 3, 1])
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert asked(lanes, "a") == asked(lanes, "b") == [[2, 3, 1]]
            stats = experts.stats
            assert (stats.calls, stats.hedges, stats.hedges_won, stats.retries) == (2, 1, 1, 1)
            assert not lanes["a"].replies[0].done(), "it is listened to: an answer would end the suspicion"
            assert torch.equal(await experts.run(1, plan), expected(plan, 1))
            assert (stats.calls, stats.hedges) == (3, 1), "the next layer goes to the other one at once"

    run_idle(work())


def test_a_hedge_goes_to_as_many_replicas_as_hold_the_experts() -> None:
    async def work() -> None:
        groups = map_of(info("a", [0, 1]), info("b", [0]), info("c", [1]))
        async with fakes(groups) as (experts, lanes):
            lanes["a"].silent = True
            for name in "bc":
                experts._pool.book.record(lanes[name].replica.replica_id).rank = 1
            plan = plan_of([2, 3])
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert (asked(lanes, "a"), asked(lanes, "b"), asked(lanes, "c")) == ([[2, 3]], [[2]], [[3]])

    run_idle(work())


def test_the_first_answer_wins_whoever_gives_it() -> None:
    async def work() -> None:
        async with fakes(pair(), silence_s=200.0) as (experts, lanes):
            lanes["a"].silent = lanes["b"].silent = True
            plan = plan_of([3])
            running = asyncio.create_task(experts.run(0, plan))
            await lanes["b"].arrived.acquire()
            lanes["a"].answer()
            assert torch.equal(await running, expected(plan, 0))
            lanes["b"].answer()
            assert (experts.stats.hedges, experts.stats.hedges_won) == (1, 0)
            assert (experts.stats.wire.late_replies, experts.stats.mismatches, experts.alarms) == (1, 0, 0)
            assert states(experts) == {"a": "healthy", "b": "healthy"}

    run_idle(work())


def test_answers_to_the_same_rows_that_differ_are_counted_and_both_are_named(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with fakes(pair()) as (experts, lanes):
            lanes["a"].silent = True
            lanes["a"].twist = lambda y_MD: y_MD + 1e-3
            plan = plan_of([3])
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            with caplog.at_level(logging.ERROR):
                lanes["a"].answer()
            assert experts.stats.mismatches == 1
            assert "layer 0: b and a give different answers to the same rows" in caplog.text
            assert states(experts) == {"a": "healthy", "b": "healthy"}, "nobody can tell which of the two is wrong"
            assert experts.alarms == 1

    run_idle(work())


def test_without_budget_nobody_is_hedged_but_an_ejected_replicas_rows_are_replayed() -> None:
    async def work() -> None:
        async with fakes(pair(), hedge_burst=0, hedge_share=0.0, silence_s=0.2) as (experts, lanes):
            lanes["a"].silent = True
            plan, loop = plan_of([3]), asyncio.get_running_loop()
            began_s = loop.time()
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert loop.time() - began_s >= 0.2
            assert (experts.stats.hedges, experts.stats.retries) == (0, 1)
            assert states(experts) == {"a": "ejected", "b": "healthy"}

    run_idle(work())


def test_when_all_are_late_together_nobody_is_blamed_at_first() -> None:
    async def work() -> None:
        everyone = map_of(*(info(f"{expert}{copy}", [expert]) for expert in range(3) for copy in "ab"), experts=3)
        async with fakes(everyone) as (experts, lanes):
            for name in ("0a", "1a", "2a"):
                lanes[name].silent = True
            plan, loop = plan_of([1, 1, 1]), asyncio.get_running_loop()
            began_s = loop.time()
            running = asyncio.create_task(experts.run(0, plan))
            await lanes["0b"].arrived.acquire()
            assert loop.time() - began_s == pytest.approx(4 * ATTEMPT_S)
            assert torch.equal(await running, expected(plan, 0))
            assert experts.stats.hedges == 3

    run_idle(work())


def test_a_hedge_whose_connection_breaks_is_replayed_on_a_third() -> None:
    async def work() -> None:
        everyone = map_of(info("a"), info("b"), info("c"), experts=1)
        async with fakes(everyone) as (experts, lanes):
            lanes["a"].silent = lanes["b"].silent = True
            plan = plan_of([3])
            running = asyncio.create_task(experts.run(0, plan))
            await lanes["b"].arrived.acquire()
            lanes.unreachable = {"b"}
            lanes["b"].fail()
            assert torch.equal(await running, expected(plan, 0))
            assert experts.stats.retry_reasons == {"SLOW": 1, "CONNECTION": 1}
            assert len(lanes["a"].requests) == 1, "who is still at it is not asked again"

    run_idle(work())


def test_the_end_of_a_connection_with_a_hedge_under_way_changes_nothing() -> None:
    async def work() -> None:
        async with fakes(pair()) as (experts, lanes):
            lanes["a"].silent = lanes["b"].silent = True
            plan = plan_of([3])
            running = asyncio.create_task(experts.run(0, plan))
            await lanes["b"].arrived.acquire()
            lanes.unreachable = {"a"}
            lanes["a"].fail()
            await asyncio.sleep(0)
            assert len(lanes["b"].requests) == 1
            lanes["b"].answer()
            assert torch.equal(await running, expected(plan, 0))

    run_idle(work())


def test_a_silent_replica_is_ejected_gets_nothing_but_probes_and_is_taken_back() -> None:
    async def work() -> None:
        async with fakes(pair(), silence_s=0.01, eject_s=0.01) as (experts, lanes):
            lanes["a"].silent = True
            plan = plan_of([3])
            while states(experts)["a"] != "ejected":
                assert torch.equal(await experts.run(0, plan), expected(plan, 0))
                await asyncio.sleep(0.001)
            assert asked(lanes, "a") == [[3]], "it has not answered that one: no probe either"
            lanes["a"].silent = False
            lanes["a"].answer()
            while states(experts)["a"] != "healthy":
                assert torch.equal(await experts.run(0, plan), expected(plan, 0))
                await asyncio.sleep(0.001)
            await experts.run(0, plan)
            probes = asked(lanes, "a").count([1])
            assert probes >= 2
            assert asked(lanes, "a")[1 : 1 + probes] == [[1]] * probes, "nothing but one row until it is trusted"
            assert asked(lanes, "a")[-1] == [3]
            assert experts.stats.hedges == 1 + probes
            assert experts.standings()[0].ejections_total == 1

    run_idle(work())


@pytest.mark.parametrize("add", [0.0, 1.0])
def test_a_probe_counts_only_with_the_bits_of_the_answer_that_was_used(add: float) -> None:
    async def work() -> None:
        groups = map_of(info("a", [0]), info("b", [0]), info("c", [1]))
        long = {"silence_s": 0.01, "eject_s": 0.01, "probes": 1, "bad_probes": 1, "least_gap_s": 30.0}
        async with fakes(groups, **long) as (experts, lanes):
            lanes["a"].silent = True
            plan = plan_of([3, 2])
            while states(experts)["a"] != "ejected":
                await experts.run(0, plan)
                await asyncio.sleep(0.001)
            lanes["a"].answer()
            lanes["a"].twist = lambda y_MD: y_MD + add
            lanes["c"].silent = True
            while states(experts)["a"] != "probing":
                lanes["c"].arrived = asyncio.Semaphore(0)
                running = asyncio.create_task(experts.run(0, plan))
                await lanes["c"].arrived.acquire()
                if states(experts)["a"] == "probing":
                    lanes["a"].answer()
                    assert states(experts)["a"] == ("ejected" if add else "healthy")
                    assert experts.stats.mismatches == (1 if add else 0)
                    lanes["c"].answer()
                    assert torch.equal(await running, expected(plan, 0))
                    return
                lanes["c"].answer()
                await running
                await asyncio.sleep(0.001)

    run_idle(work())


def test_an_ejected_replica_is_better_than_none() -> None:
    async def work() -> None:
        async with fakes(pair(), silence_s=0.01) as (experts, lanes):
            lanes["a"].silent = True
            plan = plan_of([3])
            while states(experts)["a"] != "ejected":
                await experts.run(0, plan)
                await asyncio.sleep(0.001)
            lanes["a"].silent = False
            lanes.unreachable = {"b"}
            lanes["b"].fail()
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            while states(experts) != {"a": "healthy", "b": "away"}:  # noqa: ASYNC110 - the link notices in its own turn
                await asyncio.sleep(0.001)

    run_idle(work())


def test_nobody_left_until_the_deadline_is_an_error_that_says_why() -> None:
    async def work() -> None:
        async with fakes(pair()) as (experts, lanes):
            lanes.unreachable = {"a", "b"}
            lanes["a"].fail("the replica's process is gone")
            lanes["b"].fail("the replica's process is gone")
            while any(one.detail != "unreachable as told" for one in experts.standings()):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            with pytest.raises(ExpertUnavailable, match="a: unreachable as told; b: unreachable as told"):
                await run_for(experts, 0.5, plan_of([3]))

    run_idle(work())


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_chosen_while_somebody_of_better_standing_can_be_asked(seed: int) -> None:
    async def work() -> None:
        names = "abcde"
        everyone = map_of(*(info(name) for name in names), experts=1)
        async with fakes(everyone) as (experts, lanes):
            rng, pool = random.Random(seed), experts._pool
            for _ in range(100):
                for name in names:
                    link = next(one for one in pool.named(0, 0) if one.replica.replica_id == name)
                    link.record.rank = rng.randrange(3)
                    link.record.state = rng.choice([State.HEALTHY, State.HEALTHY, State.QUARANTINED])
                    link.times.tokens = 100 * rng.randrange(3)
                able = pool.able(0, 0)
                (chosen,) = pool.choose(0, [ExpertRows(0, slice(0, 4))])
                assert chosen is (able[0] if able else None), "of those on a par, the one with the least in flight"
            assert lanes.made.keys() == set(names)

    run_idle(work())


# ---- answers that cannot be ---------------------------------------------------------------------------------


def spoil(value: float) -> Any:
    def twist(y_MD: torch.Tensor) -> torch.Tensor:
        y_MD[-1, 0] = value
        return y_MD

    return twist


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_replica_whose_answer_is_not_finite_though_anothers_is_is_quarantined(value: float) -> None:
    async def work() -> None:
        async with fakes(pair(2)) as (experts, lanes):
            lanes["a"].twist = spoil(value)
            plan = plan_of([2, 3])
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert asked(lanes, "b") == [[2, 3]], "if some of an answer is wrong, all of it may be"
            assert experts.stats.retry_reasons == {"NONFINITE": 2}
            assert states(experts) == {"a": "quarantined", "b": "healthy"}
            assert experts.alarms == 1
            lanes["a"].twist = None
            assert torch.equal(await experts.run(1, plan), expected(plan, 1))
            assert len(lanes["a"].requests) == 1
            detail = experts.standings()[0].detail
            assert detail == "it gave an answer that is not finite for expert 1, b another"

    run_idle(work())


def test_two_replicas_with_the_same_bits_are_the_models_honest_answer() -> None:
    async def work() -> None:
        async with fakes(pair()) as (experts, lanes):
            lanes["a"].twist = lanes["b"].twist = spoil(INF)
            plan = plan_of([3])
            assert (await experts.run(0, plan))[-1, 0] == INF
            assert (len(lanes["a"].requests), len(lanes["b"].requests)) == (1, 1)
            assert states(experts) == {"a": "healthy", "b": "healthy"}

    run_idle(work())


def test_the_only_replica_is_asked_once_more() -> None:
    async def work() -> None:
        async with fakes(map_of(info("a"), experts=1)) as (experts, lanes):
            lanes["a"].twist = spoil(INF)
            assert (await experts.run(0, plan_of([3])))[-1, 0] == INF
            assert len(lanes["a"].requests) == 2
            assert states(experts) == {"a": "healthy"}

    run_idle(work())


def test_the_only_replica_that_contradicts_itself_is_waited_for_until_it_is_another_process() -> None:
    async def work() -> None:
        async with fakes(map_of(info("a"), experts=1)) as (experts, lanes):
            first, plan = lanes["a"], plan_of([3])
            calls = iter([spoil(NAN)])
            first.twist = lambda y_MD: next(calls, lambda y: y)(y_MD)
            with pytest.raises(ExpertUnavailable, match=r"NONFINITE.*a: quarantined: it gave an answer that is not"):
                await run_for(experts, 0.5, plan)
            assert len(first.requests) == 2
            first.fail("cut")  # the same process, connected to again
            with pytest.raises(ExpertUnavailable, match="a: quarantined"):
                await run_for(experts, 0.5, plan)
            running = asyncio.create_task(experts.run(0, plan))
            lanes.restarted = {"a"}
            lanes["a"].fail("cut")
            assert torch.equal(await running, expected(plan, 0))
            assert states(experts) == {"a": "healthy"}

    run_idle(work())


def test_what_is_not_finite_because_its_rows_were_not_is_believed_at_once() -> None:
    async def work() -> None:
        async with fakes(pair()) as (experts, _):
            plan = plan_of([3])
            plan.x_TD[1, 2] = NAN
            assert same_bits(await experts.run(0, plan), expected(plan, 0))
            assert experts.stats.calls == 1

    run_idle(work())


def test_a_sum_that_overflows_is_nothing_to_doubt() -> None:
    async def work() -> None:
        async with fakes(pair()) as (experts, _):
            plan = plan_of([4])
            plan.x_TD.fill_(1.5e38)
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert experts.stats.calls == 1

    run_idle(work())


def test_of_two_different_strange_answers_the_one_that_is_given_twice_is_the_models() -> None:
    async def work() -> None:
        async with fakes(pair()) as (experts, lanes):
            lanes["a"].twist, lanes["b"].twist = spoil(INF), spoil(-INF)
            plan = plan_of([3])
            assert (await experts.run(0, plan))[-1, 0] == INF
            assert states(experts) == {"a": "healthy", "b": "quarantined"}

    run_idle(work())


def test_an_answer_of_a_wrong_shape_is_the_replicas_fault_if_another_gives_a_right_one() -> None:
    async def work() -> None:
        async with fakes(pair()) as (experts, lanes):
            lanes["a"].malformed = True
            plan = plan_of([2])
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert experts.stats.retry_reasons == {"MALFORMED": 1}
            assert states(experts) == {"a": "quarantined", "b": "healthy"}

    run_idle(work())


def test_what_a_quarantined_replica_still_answers_is_not_believed() -> None:
    async def work() -> None:
        async with fakes(pair(), hedge_burst=0, hedge_share=0.0, silence_s=200.0) as (experts, lanes):
            lanes["a"].silent = True
            first, second = plan_of([3], 1), plan_of([2], 2)
            early = asyncio.create_task(experts.run(0, first))
            await lanes["a"].arrived.acquire()
            experts._pool.times.of(lanes["a"].replica.replica_id).tokens = 0  # the next one goes there too
            experts._pool.times.of(lanes["a"].replica.replica_id).calls = 0
            late = asyncio.create_task(experts.run(0, second))
            await lanes["a"].arrived.acquire()
            lanes["a"].twist = spoil(NAN)
            lanes["a"].answer(1)
            assert torch.equal(await late, expected(second, 0))
            assert states(experts)["a"] == "quarantined"
            lanes["a"].twist = None
            lanes["a"].answer(0)
            assert torch.equal(await early, expected(first, 0))
            assert asked(lanes, "b") == [[2], [3]]
            assert experts.stats.retry_reasons["QUARANTINED"] == 1

    run_idle(work())


# ---- real lanes -------------------------------------------------------------------------------------------


NEVER_LATE = TimeoutPolicy(floor_s=200.0, start_s=200.0, most_s=200.0)
UNHURRIED = HealthPolicy(timeout=NEVER_LATE)
"""However slow the machine is, nobody is hedged for it."""


@dataclass
class TwistedColumn(FakeColumn):
    """Takes `delay_s` longer, and adds `add` to its answers."""

    add: float = 0.0
    delay_s: float = 0.0
    layers_seen: list[int] = field(default_factory=list)

    def forward(self, layer: int, x_MD: torch.Tensor) -> torch.Tensor:
        time.sleep(self.delay_s)  # in the compute thread: a slow kernel
        y_MD = super().forward(layer, x_MD)
        self.layers_seen.append(layer)
        return y_MD + self.add if self.add else y_MD


@asynccontextmanager
async def attached(
    expert_map: ExpertMap,
    lane: bool,
    num_rows: int = 64,
    health: HealthPolicy = UNHURRIED,
    selector: SelectorPolicy = TOGETHER,
) -> AsyncIterator[RemoteExperts]:
    memory = LaneMemory.create(num_rows, WIDTH, num_rows) if lane else None
    attacher = Attacher(credentials(), memory, lane_only=lane)
    patience = Patience(deadline_s=120, health=health)
    experts = RemoteExperts(attacher, patience, lanes=memory, selector=selector)
    try:
        experts.apply_map(expert_map)
        await experts.wait_ready(120, all_replicas=True)
        yield experts
    finally:
        await experts.close()


@pytest.mark.parametrize("lane", [False, True], ids=["grpc", "shm"])
@pytest.mark.parametrize("add", [0.0, 0.5], ids=["agrees", "differs"])
def test_a_losers_late_answer_is_compared_with_rows_kept_for_it(lane: bool, add: float) -> None:
    async def work() -> None:
        slow, quick = TwistedColumn(0, add=add), FakeColumn(0)
        late_at_first = TimeoutPolicy(floor_s=ATTEMPT_S, start_s=ATTEMPT_S, most_s=200.0)
        only_the_first = HealthPolicy(timeout=late_at_first, eject_s=9.0)
        slow.gate.clear()
        async with (
            served(slow, experts=[0], replica_id="a") as one,
            served(quick, experts=[0], replica_id="b") as two,
            attached(map_of(one.info(), two.info(), experts=1), lane, health=only_the_first) as experts,
        ):
            plan = plan_of([5])
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            for size in [*range(1, SIZES)] * 16:  # from here on nobody is late
                experts._pool.book.times.add(size, 200.0)
            for seed in range(50):  # rows of later rounds do not lie where the first ones do
                other = plan_of([6], seed)
                assert torch.equal(await experts.run(1, other), expected(other, 1))
            slow.gate.set()
            while experts.stats.wire.late_replies < 1:  # noqa: ASYNC110 - nobody waits for it: there is no event
                await asyncio.sleep(0.001)
            assert experts.stats.mismatches == (1 if add else 0)
            if lane:
                assert experts._lanes is not None
                assert experts._lanes.rows._space.num_taken == 0
            assert slow.layers_seen == [0]

    run(work())


@pytest.mark.parametrize("held", [[0], [0, 1]], ids=["alone", "in sums"])
@pytest.mark.parametrize("lane", [False, True], ids=["grpc", "shm"])
def test_a_column_with_nan_is_found_out_by_every_lane(lane: bool, held: list[int]) -> None:
    async def work() -> None:
        bad = [TwistedColumn(expert, add=NAN) for expert in held]
        rest = [expert for expert in (0, 1) if expert not in held]
        async with (
            served(*bad, experts=held, replica_id="a") as one,
            served(FakeColumn(0), FakeColumn(1), experts=[0, 1], replica_id="b") as two,
            attached(map_of(one.info(), two.info()), lane, selector=SelectorPolicy()) as experts,
        ):
            generator = torch.Generator().manual_seed(3)
            x_TD = torch.randn(6, WIDTH, generator=generator)
            plan = dispatch(x_TD, torch.randn(6, 2, generator=generator), 2)
            pieces = [answer(expert, 0, plan.x_ND[plan.rows(expert)]) for expert in (0, 1)]
            want = combine(torch.cat(pieces), plan)
            for _ in range(3):
                assert same_bits(combine(await experts.run(0, plan), plan), want)
            assert states(experts) == {"a": "quarantined", "b": "healthy"}
            assert sum(len(column.calls) for column in bad) <= 2 * len(held), "once or twice, and never again"
            assert not rest or two.replica.counters.messages_total >= 3

    run(work())


@pytest.mark.parametrize("lane", [False, True], ids=["grpc", "shm"])
def test_a_replica_that_is_slow_and_never_late_is_ejected_and_taken_back_when_it_is_quick_again(lane: bool) -> None:
    async def work() -> None:
        columns = {f"{expert}{copy}": TwistedColumn(expert) for expert in range(3) for copy in "ab"}
        async with AsyncExitStack() as stack:
            infos = []
            for name, column in columns.items():
                there = await stack.enter_async_context(served(column, experts=[column.expert], replica_id=name))
                infos.append(there.info())
            health = HealthPolicy(timeout=NEVER_LATE, eject_s=0.05, compare_s=0.01, most_eject_s=0.05)
            experts = await stack.enter_async_context(attached(map_of(*infos, experts=3), lane, health=health))
            plan, want = plan_of([2, 3, 2]), expected(plan_of([2, 3, 2]), 0)

            async def until(state: str) -> None:
                while states(experts)["1a"] != state:
                    assert torch.equal(await experts.run(0, plan), want)

            for _ in range(40):
                assert torch.equal(await experts.run(0, plan), want)
            columns["1a"].delay_s = 0.1
            await until("ejected")
            detail = next(one.detail for one in experts.standings() if one.replica_id == "1a")
            assert "times slower than its siblings" in detail
            columns["1a"].calls.clear()
            for _ in range(40):
                assert torch.equal(await experts.run(0, plan), want)
            assert {rows for _, rows in columns["1a"].calls} <= {1}, "nothing but probes"
            columns["1a"].delay_s = 0.0
            await until("healthy")
            assert experts.stats.retry_reasons["SLOW"] == 0

    run(work())


def test_the_process_at_the_other_end_has_a_name() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0], replica_id="a") as one:
            for lane in (False, True):
                async with attached(map_of(one.info(), experts=1), lane) as experts:
                    incarnation = experts._pool.book.record(one.info().replica_id).incarnation
                    assert incarnation.endswith(f"@/{one.server.address}")
                    assert int(incarnation.split("@")[0]) > 0

    run(work())
