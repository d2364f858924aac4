"""Layouts count right, and a draft's running figures equal those counted from nothing."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ids import NodeId
from cluster.layout import Grain, Host, Layout, critical_share
from cluster.layout_draft import Draft
from cluster.policy import Observation
from tests.support.layouts import hosts, layout


def test_a_grain_numbers_its_units_by_range_and_expert() -> None:
    grain = Grain(num_experts=4, bounds=(0, 3, 8), layer_bytes=10)
    assert (grain.num_layers, grain.num_ranges, grain.num_units) == (8, 2, 8)
    assert grain.bytes_U.tolist() == [30] * 4 + [50] * 4
    assert [grain.unit(layer, 1) for layer in (0, 2, 3, 7)] == [1, 1, 5, 5]
    assert grain.layers(5) == slice(3, 8)
    assert (grain.say(5), Grain.even(8, 4).say(1)) == ("expert 1 in layers 3-7", "expert 1")
    assert Grain.even(8, 4, num_ranges=3).bounds == (0, 3, 5, 8)


@pytest.mark.parametrize("bounds", [(0,), (1, 3), (0, 3, 3), (0, 3, 2)])
def test_bounds_must_ascend_from_zero(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="bounds are"):
        Grain(num_experts=1, bounds=bounds, layer_bytes=1)


def test_a_layout_knows_what_is_free_and_keeps_what_is_on_hosts_that_stay() -> None:
    grain = Grain.even(2, 2, layer_bytes=10)
    start = layout(grain, hosts(2, 2, memory=50), [(0, 0), (1, 0), (1, 1)])
    assert start.copies_U.tolist() == [1, 2]
    assert start.slots_free_N.tolist() == [0, 1]
    assert start.bytes_free_N.tolist() == [10, 30]
    moved = start.on([*hosts(3, 2)[2:], start.hosts[1]])
    assert moved.held_UN.tolist() == [[False, False], [False, True]]
    with pytest.raises(ValueError, match="read-only"):
        start.held_UN[0, 0] = False


def test_busy_shares_split_work_among_copies_by_speed_of_host() -> None:
    fast = Host(node_id=NodeId("n1"), slots=2, memory_bytes=99, speed=2.0)
    at = layout(Grain.even(2, 2), [hosts(1, 2)[0], fast], [(0, 0), (0, 1), (1, 1)])
    busy_LN = at.busy_LN(np.array([[0.2, 0.4], [0.0, 0.1]]))
    assert busy_LN == pytest.approx(np.array([[0.1, 0.25], [0.0, 0.05]]))
    assert critical_share(busy_LN) == pytest.approx(0.3)


@pytest.mark.parametrize(("parallelism", "busy"), [(1, 0.9), (2, 0.5), (3, 0.5)])
def test_a_host_works_on_several_units_at_once_and_on_each_of_them_alone(parallelism: int, busy: float) -> None:
    host = replace(hosts(1, 3)[0], parallelism=parallelism)
    at = layout(Grain.even(1, 3), [host], [(0, 0), (1, 0), (2, 0)])
    assert at.busy_LN(np.array([[0.5, 0.1, 0.3]])) == pytest.approx(np.array([[busy]]))
    assert at.busy_LN(np.array([[0.3, 0.3, 0.3]])) == pytest.approx(np.array([[0.9 / parallelism]]))


def test_shapes_and_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"held_UN has shape \(1, 1\), but there are 2 units and 1 hosts"):
        Layout(Grain.even(1, 2), hosts(1), np.zeros((1, 1), np.bool_))
    with pytest.raises(ValueError, match="two hosts have the same node_id"):
        Layout.empty(Grain.even(1, 2), hosts(1) * 2)
    with pytest.raises(ValueError, match="speed 0"):
        Host(node_id=NodeId("n"), slots=1, memory_bytes=1, speed=0)
    with pytest.raises(ValueError, match="parallelism 0"):
        Host(node_id=NodeId("n"), slots=1, memory_bytes=1, parallelism=0)
    with pytest.raises(ValueError, match="num_ranges is 3"):
        Grain.even(2, 2, num_ranges=3)
    empty = Layout.empty(Grain.even(1, 2), hosts(1))
    for work in (np.ones((2, 1)), np.array([[np.nan, 0]]), np.array([[-1.0, 0]])):
        with pytest.raises(ValueError, match="work_LE has shape"):
            Observation(now_s=0, layout=empty, work_LE=work)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_a_draft_keeps_count_and_takes_back_what_it_did(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grain = Grain(num_experts=3, bounds=(0, 2, 5), layer_bytes=7)
    at_once = rng.integers(1, int(rng.choice([1, 4])) + 1, 4)
    on = tuple(replace(host, parallelism=int(each)) for host, each in zip(hosts(4, 9), at_once, strict=True))
    start = Layout(grain, on, rng.random((6, 4)) < 0.5)
    work_LE = rng.random((5, 3))
    draft = Draft(start, work_LE)
    at_start, done = draft.loads, []
    for _ in range(10):
        unit, host = int(rng.integers(6)), int(rng.integers(4))
        done.append((unit, host, not draft.held_UN[unit, host]))
        draft.redo(done[-1:])
        before, busy_LN = draft.loads, draft.busy_LN.copy()
        once_more = ((unit, host, not draft.held_UN[unit, host]),)
        draft.redo(once_more)
        draft.undo(once_more, before)
        assert (draft.busy_LN == busy_LN).all()
    now = Layout(grain, start.hosts, draft.held_UN)
    assert draft.busy_LN == pytest.approx(now.busy_LN(work_LE))
    assert (draft.copies_U == now.copies_U).all()
    assert (draft.slots_free_N == now.slots_free_N).all()
    assert (draft.bytes_free_N == now.bytes_free_N).all()
    draft.undo(done, at_start)
    assert (draft.held_UN == start.held_UN).all()
    assert draft.busy_LN == pytest.approx(start.busy_LN(work_LE))


def test_the_smooth_cost_is_at_least_the_share_and_sees_the_second_busiest() -> None:
    grain = Grain.even(1, 3)
    work_LE = np.array([[0.4, 0.4, 0.1]])
    tied = Draft(layout(grain, hosts(3), [(0, 0), (1, 1), (2, 2)]), work_LE)
    alone = Draft(layout(grain, hosts(4), [(0, 0), (1, 1), (1, 3), (2, 2)]), work_LE)
    assert critical_share(tied.busy_LN) == critical_share(alone.busy_LN) == 0.4
    assert tied.smooth_cost() > alone.smooth_cost() >= 0.4
    assert Draft(tied.layout, None).smooth_cost() == 0.0
