"""Static, reactive, predictive, and the pauses after failures."""

import numpy as np
import pytest

from cluster.ids import NodeId
from cluster.incremental import Incremental
from cluster.layout import Grain, Layout
from cluster.policies import NAMES, policy_named
from cluster.policy import Action, Copy, Drop, Observation
from cluster.predictive import Forecast, Predictive
from cluster.reactive import Reactive, static
from cluster.retries import Pauses, WithPauses
from tests.support.layouts import hosts, layout, settle, watched

GRAIN = Grain.even(2, 4, layer_bytes=10)


def seen(
    at: Layout, work: float | np.ndarray = 0.01, now_s: float = 0.0, failed: tuple[Action, ...] = ()
) -> Observation:  # type: ignore[type-arg]
    work_LE = np.broadcast_to(work, (2, 4)).astype(np.float64)
    return Observation(now_s=now_s, layout=at, work_LE=work_LE, failed=failed)


def test_static_places_evenly_once_and_only_mends() -> None:
    rest, _, _ = settle(static, Layout.empty(GRAIN, hosts(4, 2)), np.ones((2, 4)))
    assert rest.copies_U.tolist() == [2] * 4
    assert static(seen(rest, np.array([9.0, 0, 0, 0])), None) == ((), None)
    left = rest.on([*rest.hosts[1:], *hosts(5, 2)[4:]])
    actions, _ = static(seen(left), None)
    assert (watched(left, actions).copies_U == 2).all()


def test_reactive_adds_above_the_one_threshold_and_drops_below_the_other_after_a_pause() -> None:
    policy = Reactive(budget_bytes=100, high_share=0.3, low_share=0.1, cooldown_s=30)
    now, state = layout(GRAIN, hosts(4, 2), [(e, n % 4) for e in range(4) for n in (e, e + 1)][:7]), None
    now = now.on([*now.hosts, *hosts(6, 2)[4:]])
    hot = np.array([0.5, 0.1, 0.1, 0.1])
    counts = []
    for step in range(12):
        work = hot if step < 6 else np.full(4, 0.02)
        actions, state = policy(seen(now, work, now_s=10.0 * step), state)
        now = watched(now, actions)
        counts.append(int(now.copies_U[0]))
    assert counts[0] == 3
    assert max(counts[:6]) == 4  # 1.0 of work: four copies are below 0.3
    assert counts[3] - counts[2] <= 1
    assert counts[-1] == 3 or counts[-1] == 2
    assert counts[6] >= counts[7] >= counts[8]


def test_reactive_comes_to_rest() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        work_LE = rng.random((2, 4)) * 0.4
        settle(Reactive(budget_bytes=100), Layout.empty(GRAIN, hosts(6, 3)), work_LE, rounds=100)


def test_thresholds_must_not_cross() -> None:
    with pytest.raises(ValueError, match=r"low_share is 0\.5"):
        Reactive(budget_bytes=1, low_share=0.5)
    with pytest.raises(ValueError, match="min_copies is 3, max_copies 2"):
        Reactive(budget_bytes=1, min_copies=3, max_copies=2)


def test_a_forecast_follows_a_ramp_and_is_bounded() -> None:
    forecast = Forecast(np.zeros((1, 1)), np.zeros((1, 1)), 0.0)
    for now_s in range(10, 400, 10):
        forecast = forecast.seen(np.array([[now_s / 100]]), now_s, 20.0)
    assert forecast.ahead(50.0).item() == pytest.approx(4.4, rel=0.05)
    assert forecast.ahead(1e9).item() == pytest.approx(2 * forecast.level_LE.item())
    falling = Forecast(np.ones((1, 1)), np.full((1, 1), -1.0), 0.0)
    assert falling.ahead(5.0).item() == 0.0
    assert falling.seen(np.ones((1, 1)), 0.0, 1.0) is falling


def test_prediction_moves_before_the_load_is_there() -> None:
    start = layout(GRAIN, hosts(4, 3), [(e, n % 4) for e in range(4) for n in (e, e + 1)])
    inner = Incremental(budget_bytes=100)
    first_move = []
    for policy in (inner, Predictive(inner=inner, horizon_s=60, half_life_s=15)):
        now, state = start, None
        for step in range(40):
            work = np.array([0.05 + 0.004 * step, 0.05, 0.05, 0.05])
            actions, state = policy(seen(now, work, now_s=10.0 * step), state)
            now = watched(now, actions)
            if actions:
                first_move.append(step)
                break
    assert len(first_move) == 2
    assert first_move[1] < first_move[0]
    with pytest.raises(ValueError, match="half_life_s 0"):
        Predictive(inner=inner, half_life_s=0)


def test_pauses_double_up_to_the_cap_and_are_forgotten() -> None:
    pauses: Pauses[str] = Pauses(base_s=10, cap_s=30)
    ends = []
    now_s = 0.0
    for _ in range(4):
        pauses = pauses.failed(["x"], now_s)
        ends.append(pauses.entries["x"][1] - now_s)
        now_s = pauses.entries["x"][1]
    assert ends == [10, 20, 30, 30]
    assert pauses.paused(now_s) == frozenset()
    assert pauses.failed([], now_s + 31).entries == {}


def test_a_copy_that_failed_goes_elsewhere_and_nothing_else_waits() -> None:
    start = layout(GRAIN, hosts(4, 2), [(0, 0)])
    policy = WithPauses(inner=Incremental(budget_bytes=1000), base_s=60)
    actions, state = policy(seen(start), None)
    failed = next(a for a in actions if isinstance(a, Copy) and a.unit == 1)
    now = watched(start, [a for a in actions if a is not failed and isinstance(a, Copy) and a.unit != 1])
    actions, state = policy(seen(now, now_s=1.0, failed=(failed,)), state)
    assert {a.node_id for a in actions if isinstance(a, Copy) and a.unit == 1}.isdisjoint({failed.node_id})
    assert any(isinstance(a, Copy) and a.unit == 1 for a in actions)
    assert state[0].paused(60.9) == {(1, failed.node_id)}
    assert state[0].paused(61.0) == frozenset()


@pytest.mark.parametrize("name", NAMES)
def test_each_shipped_policy_serves_all_from_an_empty_cluster(name: str) -> None:
    policy = policy_named(name, budget_bytes=1000)
    now, state = Layout.empty(GRAIN, hosts(5, 2)), None
    for step in range(5):
        actions, state = policy(seen(now, np.array([0.5, 0.1, 0.1, 0.1]), now_s=60.0 * step), state)
        assert all(isinstance(a, Copy | Drop) for a in actions)
        now = watched(now, actions)
    assert (now.copies_U >= 1).all()


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match="policy is 'best', but it must be one of static, reactive, eplb"):
        policy_named("best", budget_bytes=1)


def test_a_place_is_a_pair() -> None:
    assert (0, NodeId("n0")) in frozenset({(0, "n0")})
