"""A deadline follows what was measured: of everybody, lately, in rounds of this size."""

import random

import pytest

from cluster.service_times import SIZES, WINDOW, ServiceTimes, TimeoutPolicy, size_of


def fed(size: int, *seconds: float, times: int = 1) -> ServiceTimes:
    found = ServiceTimes()
    for _ in range(times):
        for one in seconds:
            found.add(size, one)
    return found


def test_sizes_are_powers_of_two() -> None:
    assert [size_of(rows) for rows in (1, 2, 3, 4, 7, 8, 1024)] == [1, 2, 2, 3, 3, 4, 11]
    assert size_of(1 << 60) == SIZES - 1


def test_before_anything_is_known_patience_is_long() -> None:
    times = ServiceTimes()
    assert {times.timeout_s(size) for size in range(SIZES)} == {times.policy.start_s}
    assert times.typical_s(3) == 0


def test_three_times_the_slowest_in_a_hundred_but_not_less_than_the_floor() -> None:
    fast = fed(3, 0.001, times=300)
    assert fast.timeout_s(3) == fast.policy.floor_s == 0.05
    slow = fed(3, *([0.1] * 250), 0.3, 0.3, 0.3, 0.3, 0.3, 0.3)
    assert slow.timeout_s(3) == pytest.approx(0.9)
    assert slow.typical_s(3) == 0.1
    assert fed(3, 30.0, times=300).timeout_s(3) == slow.policy.most_s


def test_one_slow_answer_among_very_many_changes_nothing() -> None:
    times = fed(3, 0.02, times=WINDOW)
    times.add(3, 5.0)
    for _ in range(64):
        times.add(3, 0.02)
    assert times.timeout_s(3) == pytest.approx(0.06)


def test_when_everything_slows_down_the_deadline_follows_and_comes_back() -> None:
    times = fed(3, 0.02, times=WINDOW)
    for _ in range(64):
        times.add(3, 0.2)
    assert times.timeout_s(3) == pytest.approx(0.6)
    for _ in range(WINDOW + 64):
        times.add(3, 0.02)
    assert times.timeout_s(3) == pytest.approx(0.06)


def test_a_size_that_is_new_borrows_from_others_on_the_generous_side() -> None:
    larger = fed(6, 0.04, times=20)
    assert larger.timeout_s(4) == pytest.approx(0.12)
    smaller = fed(4, 0.04, times=20)
    assert smaller.timeout_s(6) == pytest.approx(0.48), "in proportion to the rows"
    assert smaller.timeout_s(SIZES - 1) == smaller.policy.most_s
    smaller.add(6, 1.0)
    assert smaller.timeout_s(6) == pytest.approx(3.0), "what was seen counts at once"


def test_a_pace_is_told_against_what_was_typical() -> None:
    times = ServiceTimes()
    assert times.add(2, 0.01) == 1.0
    assert times.add(2, 0.1) == pytest.approx(10)


@pytest.mark.parametrize("seed", range(20))
def test_a_deadline_is_always_within_its_bounds(seed: int) -> None:
    rng = random.Random(seed)
    policy = TimeoutPolicy(floor_s=0.01, start_s=1.0, most_s=4.0)
    times = ServiceTimes(policy)
    for _ in range(3000):
        times.add(rng.randrange(SIZES), rng.expovariate(rng.choice([1, 100, 10_000])))
        assert policy.floor_s <= times.timeout_s(rng.randrange(SIZES)) <= policy.most_s


@pytest.mark.parametrize(
    "bad", [{"quantile": 0.0}, {"factor": 0.5}, {"floor_s": 0.0}, {"start_s": 0.01}, {"start_s": 30.0}]
)
def test_a_policy_that_contradicts_itself_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        TimeoutPolicy(**bad)
