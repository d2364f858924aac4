"""What a step would take on another number of hosts: worked by hand, and its limits."""

from typing import Any

import numpy as np
import pytest

from cluster.autoscale import Autoscaled
from cluster.demand import Demand, StepModel
from cluster.layout import Grain, Layout
from cluster.policy import AddHosts, Observation
from cluster.reactive import static
from tests.support.layouts import hosts, layout

GRAIN = Grain.even(1, 4, layer_bytes=1)


def spread(num_hosts: int, copies: int = 1) -> Layout:
    """Every expert on `copies` hosts, in turn."""
    return layout(GRAIN, hosts(num_hosts, 4), [(e, (e + c) % num_hosts) for e in range(4) for c in range(copies)])


def window(
    at: Layout, *, calls: float, growing: float, steps_per_s: float = 10.0, own_s: float = 0.02, now_s: float = 0.0
) -> Observation:
    """Every expert has the same work: `calls` s of every step, `growing` of every second."""
    call_LE, growing_LE = np.full((1, 4), calls * steps_per_s), np.full((1, 4), growing)
    per_host = 4 / len(at.hosts)
    step_s = own_s + max(calls * per_host, calls) + growing * per_host / steps_per_s
    return Observation(
        now_s=now_s,
        layout=at,
        work_LE=call_LE + growing_LE,
        growing_LE=growing_LE,
        steps_per_s=steps_per_s,
        step_s=step_s,
    )


def test_a_worked_example() -> None:
    seen = window(spread(2), calls=0.01, growing=0.2)
    model = Demand.first(seen).model(seen.layout, 0.0)
    # Two of four experts a host: 2 x 0.01 s of calls a step, 2 x 0.2 of the time; one call is the least.
    assert (model.num_hosts, model.fixed_s, model.fixed_floor_s) == (2, pytest.approx(0.02), pytest.approx(0.01))
    assert (model.load_share, model.own_s) == (pytest.approx(0.4), pytest.approx(0.02))
    assert model.shares(np.array([2.0, 4.0, 8.0])).tolist() == pytest.approx([0.4, 0.2, 0.1])
    assert model.shares(np.array([2.0]), 2.0).tolist() == pytest.approx([0.8])
    assert model.steps_s(np.array([2.0, 4.0])).tolist() == pytest.approx([0.04 / 0.6, 0.03 / 0.8])
    assert model.steps_s(np.array([2.0]), 3.0).tolist() == [np.inf]


def test_more_hosts_bring_less_and_less_and_below_the_floors_nothing() -> None:
    model = StepModel(
        num_hosts=2, fixed_s=0.02, fixed_floor_s=0.01, load_share=0.4, load_floor=0.05, own_s=0.02, period_s=0.1
    )
    # Of 0.08 s that a step takes on two hosts 0.06 halve with twice the hosts, on three 0.04 of 0.06.
    returns = model.returns(np.array([2.0, 3.0, 4.0, 8.0, 16.0, 17.0]))
    assert returns[0] == pytest.approx(0.06 / 0.08)
    assert (np.diff(returns) < 0).sum() >= 3
    assert returns[-2:].tolist() == [0.0, 0.0]


def test_how_long_steps_wait_in_all_says_nothing_and_the_load_share_does() -> None:
    # As many hosts and requests, three times the tokens: steps follow each other all the time in both.
    light, heavy = (window(spread(4, 2), calls=0.01, growing=g) for g in (0.1, 0.3))
    shares = [Demand.first(seen).model(seen.layout, 0.0).load_share for seen in (light, heavy)]
    assert shares[1] == pytest.approx(3 * shares[0])


def test_a_rising_load_is_expected_to_rise_and_a_falling_one_not_to_fall() -> None:
    at = spread(4)
    for sign in (1, -1):
        demand = Demand.first(window(at, calls=0.01, growing=0.3))
        for step in range(1, 30):
            demand = demand.seen(window(at, calls=0.01, growing=0.3 + sign * 0.005 * step, now_s=10.0 * step), 30.0)
        now, ahead = (demand.model(at, lead_s).load_share for lead_s in (0.0, 60.0))
        assert ahead == (pytest.approx(now + 0.03, rel=0.05) if sign > 0 else now)


def test_variance_is_learnt_and_a_jump_is_no_noise() -> None:
    at, rng = spread(4), np.random.default_rng(0)
    demand = Demand.first(window(at, calls=0.01, growing=0.3))
    for step in range(1, 400):
        growing = 0.3 * float(rng.uniform(0.8, 1.2))
        demand = demand.seen(window(at, calls=0.01, growing=growing, now_s=10.0 * step), 60.0)
    assert 0.08 < demand.deviation < 0.16
    jumped = demand.seen(window(at, calls=0.01, growing=0.9, now_s=4000.0), 60.0)
    assert jumped.model(at, 0.0).load_share == pytest.approx(0.9)
    assert demand.seen(window(at, calls=0.01, growing=0.36, now_s=4000.0), 60.0).model(at, 0.0).load_share < 0.33


def test_windows_without_steps_leave_what_a_step_costs() -> None:
    at = spread(2)
    demand = Demand.first(window(at, calls=0.01, growing=0.2))
    idle = Observation(now_s=10.0, layout=at, work_LE=np.zeros((1, 4)), growing_LE=np.zeros((1, 4)))
    later = demand.seen(idle, 30.0)
    assert later.own_s == demand.own_s
    assert (later.call_LE == demand.call_LE).all()
    assert later.seen(idle, 30.0) is later


def asked(seen: Observation, **options: Any) -> int:
    """Hosts that the scaler asks for."""
    actions, _ = Autoscaled(inner=static, min_hosts=1, max_hosts=64, **options)(seen, None)
    return sum(a.num for a in actions if isinstance(a, AddHosts))


def test_a_step_that_takes_too_long_asks_for_hosts_though_the_load_is_low() -> None:
    seen = window(spread(2, 2), calls=0.05, growing=0.05, own_s=0.01)
    assert asked(seen) == 0
    assert asked(seen, target_step_s=0.08) == 2


def test_hosts_that_would_bring_little_are_not_asked_for() -> None:
    seen = window(spread(4, 4), calls=0.001, growing=0.2, own_s=0.5, steps_per_s=1.8)
    assert asked(seen, target_step_s=0.4) == 0  # the coordinator's part alone is more
    assert asked(seen, target_step_s=0.4, min_return=0.0) > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_step_s": 0.0}, r"target_step_s 0\.0"),
        ({"half_life_s": 0}, "half_life_s 0"),
        ({"queue_s": 0.0}, r"queue_s is 0\.0"),
        ({"min_return": 1.5}, r"min_return is 1\.5"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Autoscaled(inner=static, min_hosts=1, max_hosts=2, **options)


def test_growing_work_is_a_part_of_the_work() -> None:
    at = spread(2)
    with pytest.raises(ValueError, match="growing_LE has shape"):
        Observation(now_s=0, layout=at, work_LE=np.ones((1, 4)), growing_LE=np.full((1, 4), 1.1))
    assert (Observation(now_s=0, layout=at, work_LE=np.ones((1, 4))).growing == 1).all()
