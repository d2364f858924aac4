"""What a copy brings where batches go to one replica whole: the estimate, and that the policy makes none in vain."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.assignment import Assigner
from cluster.incremental import Incremental
from cluster.indivisible import Indivisible
from cluster.layout import FloatArray, Grain, Layout, critical_share
from cluster.layout_draft import Draft
from cluster.policy import Copy, Observation
from cluster.selector import SelectorPolicy
from cluster.service_time import ServiceTime
from tests.support.layouts import hosts, layout, watched

HOT_LE = np.array([[0.4, 0.1, 0.1, 0.1]] * 2)
SHARED_LE = HOT_LE.copy()
WHOLE_LE = 0 * HOT_LE


def four_and_spare_hosts() -> Layout:
    return layout(Grain.even(2, 4), hosts(6), [(0, 0), (1, 1), (2, 2), (3, 3)])


def copies_of_the_hot_one(divisible_LE: FloatArray | None, batches: float = 1.0) -> int:
    """Copies of expert 0 once the policy has come to rest on a load that stays."""
    now, state = four_and_spare_hosts(), None
    policy = Incremental(budget_bytes=10)
    for step in range(12):
        seen = Observation(now_s=60.0 * step, layout=now, work_LE=HOT_LE, divisible_LE=divisible_LE, batches=batches)
        actions, state = policy(seen, state)
        now = watched(now, actions)
    assert not actions
    return int(now.copies_U[0])


def test_a_hot_expert_gets_copies_only_as_far_as_they_can_help() -> None:
    assert copies_of_the_hot_one(None) == 3, "all is divisible where nothing is known"
    assert copies_of_the_hot_one(SHARED_LE) == 3
    assert copies_of_the_hot_one(WHOLE_LE) == 1, "each batch goes to one of them"
    assert copies_of_the_hot_one(WHOLE_LE, batches=2.0) == 2, "two batches at a time are with two of them"


def test_experts_that_share_a_host_are_still_parted() -> None:
    # Both are asked for in every batch, and the batch waits for both.
    start = layout(Grain.even(1, 3), hosts(3, 2), [(0, 0), (1, 0), (2, 1)])
    work_LE = np.array([[0.3, 0.3, 0.05]])
    now, state, policy = start, None, Incremental(budget_bytes=10)
    for step in range(4):
        seen = Observation(now_s=60.0 * step, layout=now, work_LE=work_LE, divisible_LE=0 * work_LE)
        actions, state = policy(seen, state)
        now = watched(now, actions)
    assert critical_share(start.busy_LN(work_LE)) == pytest.approx(0.6)
    assert critical_share(now.busy_LN(work_LE)) <= 0.35


def test_the_wait_said_of_a_move_is_what_it_leads_to() -> None:
    half_LE = 0.5 * HOT_LE
    seen = Observation(now_s=0.0, layout=four_and_spare_hosts(), work_LE=HOT_LE, divisible_LE=half_LE)
    actions, _ = Incremental(budget_bytes=10, max_moves=1)(seen, None)
    assert [one.unit for one in actions if isinstance(one, Copy)] == [0]
    assert "from 80.0% to 60.0% of the time" in actions[0].reason, "half of it is halved"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_one_batch_at_a_time_takes_no_less_than_is_said(seed: int) -> None:
    """The selector on random batches: layers end no sooner than `waits`, and where all is divisible hardly later."""
    rng = np.random.default_rng(seed)
    num_experts = int(rng.integers(2, 6))
    grain = Grain.even(1, num_experts)
    on = hosts(num_experts + 3)
    held = [(e, e) for e in range(num_experts)] + [(int(rng.integers(num_experts)), num_experts + i) for i in range(3)]
    at = layout(grain, on, held)
    cost, selector = ServiceTime(1e-3, 1e-4), SelectorPolicy(message_s=0.0)
    batches = [rng.integers(1, rng.choice([8, 80]), (1, num_experts)) for _ in range(20)]
    tokens_LE, divisible_LE = np.sum(batches, axis=0), np.zeros((1, num_experts))
    least, waited_s = selector.divisible_rows(cost), 0.0
    assigner = Assigner(at, cost=cost, policy=selector)
    for batch_LE in batches:
        divisible_LE += cost.b_s * np.where(batch_LE >= least, batch_LE, 0)
        tokens_LN, calls_LN = assigner.assign(batch_LE)
        waited_s += float((calls_LN * cost.a_s + tokens_LN * cost.b_s).max())
    work_LE = len(batches) * cost.a_s + tokens_LE * cost.b_s
    seen = Observation(now_s=0.0, layout=at, work_LE=work_LE, divisible_LE=divisible_LE)
    known = Indivisible.of(seen)
    assert known is not None
    # No batch waits less than the expert that it waits for; the means of many wait for the one that waits most.
    assert waited_s >= known.waits(Draft(at, work_LE), 0) * (1 - 1e-9)


def test_parts_of_work_that_cannot_be_are_refused() -> None:
    at = four_and_spare_hosts()
    with pytest.raises(ValueError, match=r"divisible_LE has shape \(2, 4\); it must be \(2, 4\), a part of work_LE"):
        Observation(now_s=0.0, layout=at, work_LE=HOT_LE, divisible_LE=2 * HOT_LE)
    with pytest.raises(ValueError, match=r"batches is 0\.5, but it must be at least 1"):
        Observation(now_s=0.0, layout=at, work_LE=HOT_LE, batches=0.5)


def test_a_unit_that_nobody_serves_has_no_wait() -> None:
    at = layout(Grain.even(2, 4), hosts(3), [(0, 0)])
    known = Indivisible(HOT_LE, 0 * HOT_LE, 1.0)
    assert known.waits(Draft(at, HOT_LE), 0) == pytest.approx(0.8)
