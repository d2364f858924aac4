"""Extra calls are a share of all calls, with a bounded reserve."""

import random

import pytest

from cluster.hedge_budget import HedgeBudget


def test_the_reserve_is_there_from_the_first_moment_and_then_it_is_a_share() -> None:
    budget = HedgeBudget(share=0.05, burst=4)
    assert [budget.take() for _ in range(6)] == [True] * 4 + [False] * 2
    budget.calls += 19
    assert not budget.take()
    budget.calls += 2
    assert budget.take()
    assert budget.extra == 5


def test_all_or_nothing() -> None:
    budget = HedgeBudget(share=0, burst=3)
    assert not budget.take(4)
    assert budget.take(3)
    assert budget.extra == 3


@pytest.mark.parametrize("seed", range(20))
def test_never_more_than_the_share_and_the_reserve_in_any_run_of_calls(seed: int) -> None:
    rng = random.Random(seed)
    budget = HedgeBudget(share=0.05, burst=8)
    history = [(0, 0)]
    for _ in range(2000):
        budget.calls += rng.randrange(10)
        for _ in range(rng.randrange(4)):
            budget.take()
        history.append((budget.calls, budget.extra))
    for _ in range(300):
        (calls, extra), (more_calls, more_extra) = sorted(rng.sample(history, 2))
        assert more_extra - extra <= 8 + 0.05 * (more_calls - calls) + 1e-6
    assert budget.extra > 0.04 * budget.calls, "and what is allowed can be had"


@pytest.mark.parametrize("bad", [{"share": -0.1}, {"share": 1.5}, {"burst": -1}])
def test_bad_numbers_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        HedgeBudget(**bad)  # type: ignore[arg-type]
