"""The published algorithm on worked examples, and as a policy on our hosts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.eplb import Eplb, hierarchical, pack, place_globally, replicate, transition
from cluster.layout import Grain, Layout, critical_share
from cluster.policy import Observation, moved_bytes
from tests.support.layouts import hosts, layout, watched


def test_the_hottest_copy_is_replicated_next() -> None:
    assert replicate(np.array([90.0, 132, 40, 61]), 7).tolist() == [2, 3, 1, 1]
    assert replicate(np.zeros(3), 3).tolist() == [1, 1, 1]
    assert replicate(np.array([90.0, 1, 1]), 7, floor=2).tolist() == [3, 2, 2]
    with pytest.raises(ValueError, match="num_copies is 2, but there are 3"):
        replicate(np.ones(3), 2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.integers(0, 8))
def test_no_other_counts_make_the_most_loaded_copy_lighter(load: list[float], extra: int) -> None:
    load_E = np.array(load)
    copies = replicate(load_E, len(load) + extra)
    worst = (load_E / copies).max()
    assert copies.sum() == len(load) + extra
    # To be lighter than the worst, expert e would need more than load / worst copies: together more than there are.
    if worst > 0:
        needed = np.maximum(np.floor(load_E / worst * (1 + 1e-12)) + 1, 1)
        assert needed.sum() > len(load) + extra or np.isclose(load_E / worst, np.round(load_E / worst)).any()


def test_packing_takes_the_heaviest_first_and_fills_evenly() -> None:
    assert pack([5, 4, 3, 2], [2, 2]) == [0, 1, 1, 0]
    assert pack([1, 1, 1], [1, 2]) == [0, 1, 1]
    assert pack([3, 3, 1], [2, 1], kinds=[0, 0, 1]) == [0, 1, 0]
    with pytest.raises(ValueError, match="3 items do not fit"):
        pack([1, 1, 1], [1, 1])


def test_the_hierarchical_policy_keeps_groups_on_a_node() -> None:
    load = np.array([90.0, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86])
    devices = hierarchical(load, num_groups=4, num_nodes=2, num_devices=8, num_copies=16)
    assert [len(device) for device in devices] == [2] * 8
    assert {expert for device in devices for expert in device} == set(range(12))
    on_node = [{e // 3 for device in devices[n * 4 : n * 4 + 4] for e in device} for n in range(2)]
    assert on_node[0].isdisjoint(on_node[1])
    copies = Counter(e for device in devices for e in device)
    weights = [sum(load[e] / copies[e] for e in device) for device in devices]
    assert max(weights) / np.mean(weights) < 1.25
    with pytest.raises(ValueError, match="num_nodes into groups: 3 does not divide 4"):
        hierarchical(load, num_groups=4, num_nodes=3, num_devices=9, num_copies=18)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(2, 6), st.integers(1, 6))
def test_the_policy_respects_slots_and_serves_everything(seed: int, ranges: int, experts: int, num_hosts: int) -> None:
    rng = np.random.default_rng(seed)
    grain = Grain.even(3, experts, num_ranges=ranges, layer_bytes=10)
    slots = rng.integers(0, grain.num_units + 1, num_hosts)
    while slots.sum() < 2 * grain.num_units:
        slots[rng.integers(num_hosts)] += 1
    now, state = Layout.empty(grain, hosts(num_hosts, np.minimum(slots, grain.num_units + 9).tolist())), None
    for step in range(3):
        seen = Observation(now_s=step * 100.0, layout=now, work_LE=rng.dirichlet(np.ones(experts), 3))
        actions, state = Eplb()(seen, state)
        now = watched(now, actions)
        assert (now.copies_U > 0).all()


def test_it_rearranges_at_intervals_and_moves_much_for_little_noise() -> None:
    rng = np.random.default_rng(1)
    grain = Grain.even(1, 32, layer_bytes=1)
    work_LE = rng.dirichlet(np.full(32, 2.0), 1)
    now, policy = Layout.empty(grain, hosts(16, 4)), Eplb(interval_s=60)
    actions, state = policy(Observation(now_s=0, layout=now, work_LE=work_LE), None)
    now = watched(now, actions)
    assert critical_share(now.busy_LN(work_LE)) < 1.3 / 16
    noisy = work_LE * rng.uniform(0.95, 1.05, work_LE.shape)
    assert policy(Observation(now_s=59, layout=now, work_LE=noisy), state) == ((), state)
    actions, _ = policy(Observation(now_s=60, layout=now, work_LE=noisy), state)
    assert moved_bytes(actions) > 0.2 * 64


def test_a_draining_host_gets_nothing() -> None:
    grain = Grain.even(1, 4)
    seen = Observation(now_s=0, layout=Layout.empty(grain, hosts(2, [4, 0])), work_LE=np.ones((1, 4)))
    assert place_globally(seen).held_UN.sum(axis=0).tolist() == [4, 0]


def test_a_transition_that_has_no_slot_to_spare_keeps_the_old_copy() -> None:
    grain, on = Grain.even(1, 2), hosts(2, 1)
    before, after = layout(grain, on, [(0, 0), (1, 1)]), layout(grain, on, [(0, 1), (1, 0)])
    assert transition(before, after, "test") == ()
    roomy = [(0, 0), (1, 1)], [(0, 1), (1, 0)]
    start, end = (layout(grain, hosts(2, 2), held) for held in roomy)
    assert (watched(start, transition(start, end, "test")).held_UN == end.held_UN).all()
