"""Coordinators follow how full they are, one at a time, without going to and fro, and past those that never come."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.coordinator_count import CoordinatorLoad, CountPolicy, CountState

POLICY = CountPolicy(min_coordinators=1, max_coordinators=4, up_s=10.0, cooldown_s=30.0, down_s=100.0, give_up_s=200.0)


class World:
    """Coordinators that share a demand (in full coordinators) evenly; those that are `broken` never come."""

    def __init__(self, policy: CountPolicy = POLICY, num: int = 1) -> None:
        self.policy = policy
        self.state: CountState = policy.begin(num)
        self.now_s = 0.0
        self.step_s = 1.0
        self.serving = self.state.wanted
        self.broken = False
        self.changes: list[tuple[float, int]] = []
        self.said: list[str] = []

    def run(self, demand: float, for_s: float, *, waiting: bool | None = None) -> None:
        end_s = self.now_s + for_s
        while self.now_s < end_s:
            self.now_s += self.step_s
            share = demand / self.serving
            waits = share > 1 if waiting is None else waiting
            loads = [CoordinatorLoad(used=min(share, 1.0), num_waiting=int(waits))] * self.serving
            before = self.state.wanted
            self.state, why = self.policy.decide(loads, self.now_s, self.state)
            assert self.policy.min_coordinators <= self.state.wanted <= self.policy.max_coordinators
            assert abs(self.state.wanted - before) <= 1
            assert bool(why) == (self.state.wanted != before)
            if self.state.wanted != before:
                self.changes.append((self.now_s, self.state.wanted))
                self.said.append(why)
            if not self.broken or self.state.wanted < self.serving:
                self.serving = self.state.wanted


def test_they_grow_with_the_demand_and_shrink_after_it() -> None:
    world = World()
    world.run(0.5, 500)
    assert world.changes == []
    world.run(2.5, 300)
    assert [num for _, num in world.changes] == [2, 3, 4]  # 2.5 in three would be fuller than 0.8
    assert all(later - earlier >= 30 for (earlier, _), (later, _) in pairwise(world.changes))
    world.run(0.3, 1000)
    assert world.state.wanted == 1
    assert "2 coordinators instead of 1: they are 100% full" in world.said[0]


def test_a_burst_that_does_not_last_changes_nothing() -> None:
    world = World()
    for _ in range(20):
        world.run(3.0, 8)
        world.run(0.4, 5)
    assert world.changes == []


def test_requests_that_wait_everywhere_are_reason_enough() -> None:
    world = World()
    world.run(0.3, 40, waiting=True)
    assert [num for _, num in world.changes] == [2]
    assert "wait" in world.said[0]


def test_one_coordinator_where_requests_wait_is_a_matter_of_sharing_out() -> None:
    loads = [CoordinatorLoad(used=0.9, num_waiting=3), CoordinatorLoad(used=0.1, num_waiting=0)]
    state = POLICY.begin(2)
    for now_s in range(400):
        state, _ = POLICY.decide(loads, float(now_s), state)
    assert state.wanted == 2


def test_one_that_never_comes_is_given_up_and_tried_again_later() -> None:
    world = World()
    world.broken = True
    world.run(2.0, 3000)
    asked = [at_s for at_s, num in world.changes if num == 2]
    assert 3 <= len(asked) <= 9
    gaps = [later - earlier for earlier, later in pairwise(asked)]
    assert gaps == sorted(gaps)
    assert any("has not come" in why for why in world.said)
    world.broken = False
    world.run(2.0, 3000)
    assert world.state.wanted == 3


def test_nobody_is_sent_away_while_somebody_is_away() -> None:
    state = POLICY.begin(3)
    for now_s in range(1000):
        state, why = POLICY.decide([CoordinatorLoad(used=0.0, num_waiting=0)] * 2, float(now_s), state)
        assert (state.wanted, why) == (3, "")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.0, 6.0))
def test_at_an_even_demand_the_number_settles_whatever_was_before(seed: int, demand: float) -> None:
    rng = random.Random(seed)
    policy = CountPolicy(min_coordinators=1, max_coordinators=rng.randint(1, 6), down_s=60.0, cooldown_s=20.0)
    world = World(policy, rng.randint(1, 6))
    world.step_s = 5.0
    for _ in range(5):
        world.broken = rng.random() < 0.3
        world.run(rng.uniform(0, 6), rng.uniform(10, 200))
    world.broken = False
    world.run(demand, 2000)
    settled = len(world.changes)
    world.run(demand, 1000)
    assert len(world.changes) == settled
    assert world.state.wanted == policy.max_coordinators or demand / world.serving <= policy.target_used + 1e-9


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_coordinators": 0}, "min_coordinators is 0"),
        ({"max_coordinators": 0}, "max_coordinators 0"),
        ({"target_used": 0.0}, "target_used is 0"),
        ({"low_share": 1.0}, "low_share 1"),
    ],
)
def test_contradictions_are_refused(options: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CountPolicy(**{"min_coordinators": 1, "max_coordinators": 2, **options})  # type: ignore[arg-type]
