"""The search on arrays: its step is the plain search's, and what many changes cost at once is what each costs alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.balance_search import Step, best_step, in_one
from cluster.balance_trials import Changes, costs_after
from cluster.ids import NodeId
from cluster.layout import Grain, Host, Layout
from cluster.layout_draft import Draft
from tests.support import plain_search
from tests.support.layouts import hosts, layout


def random_draft(rng: np.random.Generator) -> Draft:
    """Some layers in ranges of unequal length, unequal hosts that hold a random part of them."""
    num_layers, num_experts = int(rng.integers(1, 9)), int(rng.integers(1, 9))
    grain = Grain.even(num_layers, num_experts, num_ranges=int(rng.integers(1, min(3, num_layers) + 1)), layer_bytes=10)
    num_hosts = int(rng.integers(1, 10))
    held = rng.random((grain.num_units, num_hosts)) < rng.choice([0.2, 0.5, 0.9])
    largest = int(grain.bytes_U.max())
    most_at_once = int(rng.choice([1, 1, 4]))
    on = tuple(
        Host(
            node_id=NodeId(f"n{n}"),
            slots=int(held[:, n].sum() + rng.choice([-1, 0, 0, 2])) if held[:, n].any() else 1,
            memory_bytes=int(grain.bytes_U @ held[:, n] + rng.choice([0, largest])),
            speed=float(rng.uniform(0.5, 2.0)),
            draining=bool(rng.random() < 0.1),
            parallelism=int(rng.integers(1, most_at_once + 1)),
        )
        for n in range(num_hosts)
    )
    work_LE = rng.dirichlet(np.full(num_experts, 0.7), num_layers) + 1e-3 * rng.random((num_layers, num_experts))
    max_copies = int(rng.choice([3, 1 << 30]))
    return Draft(Layout(grain, on, held), work_LE, max_copies=max_copies)


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_the_step_is_the_plain_searchs(start: int) -> None:
    num_steps = num_ties = 0
    for seed in range(start, start + 100):
        rng = np.random.default_rng(seed)
        draft = random_draft(rng)
        grain, hosts = draft.grain, draft.layout.hosts
        pairs = [(u, host.node_id) for u in range(grain.num_units) for host in hosts]
        forbidden = frozenset(pair for pair in pairs if rng.random() < 0.1) if seed % 2 else frozenset()
        layers = grain.layers(int(rng.integers(grain.num_units)))
        floor = int(rng.integers(1, 3))
        for _ in range(4):
            held_UN, busy_LN = draft.held_UN.copy(), draft.busy_LN.copy()
            step = best_step(draft, floor, forbidden, layers)
            assert (draft.held_UN == held_UN).all()
            assert (draft.busy_LN == busy_LN).all()
            expected = plain_search.best_step(draft, floor, forbidden, layers)
            if step is None or expected is None:
                assert step == expected, f"seed {seed}"
                break
            assert step.cost == pytest.approx(expected.cost, rel=1e-9)
            assert (step.num_bytes, step.price_bytes) == (expected.num_bytes, expected.price_bytes)
            if step.changes == expected.changes:
                assert (step.unit, step.source, step.layer) == (expected.unit, expected.source, expected.layer)
            else:  # two that are alike but for rounding, which differs between processors
                alike = plain_search.cost_after(draft, step.changes)
                assert alike == pytest.approx(expected.cost, rel=1e-12), f"seed {seed}"
                num_ties += 1
            draft.redo(step.changes)
            num_steps += 1
    assert num_steps > 100
    assert num_ties <= 3


def step_of(draft: Draft, *changes: tuple[int, int, bool]) -> Step:
    num_bytes = sum(int(draft.grain.bytes_U[unit]) for unit, _, held in changes if held)
    return Step(changes, num_bytes, num_bytes, draft.smooth_cost(), changes[0][0], changes[0][1], 0)


def test_what_one_step_loads_and_a_later_one_drops_is_not_loaded() -> None:
    grain = Grain.even(1, 3, layer_bytes=10)
    start = layout(grain, hosts(3, [2, 2, 1]), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2)])
    draft = Draft(start, np.array([[0.3, 0.2, 0.5]]))
    there = step_of(draft, (1, 1, False), (2, 1, True))
    gone = step_of(draft, (2, 1, False), (1, 1, True), (0, 0, False), (2, 0, True))
    one = in_one(draft, [there, gone])
    assert one is not None
    assert one.changes == ((0, 0, False), (2, 0, True))
    assert one.num_bytes == 10
    assert in_one(draft, [there]) is None, "nothing is saved"
    assert (draft.held_UN == start.held_UN).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_several_steps_in_one_end_alike_and_keep_every_rule_on_their_way(seed: int) -> None:
    rng = np.random.default_rng(seed)
    draft = random_draft(rng)
    held_UN, before, busy_LN = draft.held_UN.copy(), draft.loads, draft.busy_LN.copy()
    least_slots, least_bytes = np.minimum(draft.slots_free_N, 0), np.minimum(draft.bytes_free_N, 0)
    steps: list[Step] = []
    for _ in range(int(rng.integers(1, 4))):
        if (step := best_step(draft, 1, (), draft.grain.layers(0))) is not None:
            draft.redo(step.changes)
            steps.append(step)
            if rng.random() < 0.5:
                back = step_of(draft, *((unit, host, not held) for unit, host, held in reversed(step.changes)))
                draft.redo(back.changes)
                steps.append(back)
    end_UN = draft.held_UN.copy()
    draft.undo([change for step in steps for change in step.changes], before)
    one = in_one(draft, steps) if steps else None
    assert (draft.held_UN == held_UN).all()
    assert (draft.busy_LN == busy_LN).all()
    if one is not None:
        assert one.num_bytes == int(draft.grain.bytes_U @ (end_UN & ~held_UN).sum(axis=1))
        assert one.num_bytes < sum(step.num_bytes for step in steps)
        for change in one.changes:
            draft.redo([change])
            assert (draft.slots_free_N >= least_slots).all()
            assert (draft.bytes_free_N >= least_bytes).all()
            assert ((draft.copies_U >= 1) >= held_UN.any(axis=1)).all(), "a unit is served by nobody"
        assert (draft.held_UN == end_UN).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_what_changes_cost_all_at_once_is_what_each_costs_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    draft = random_draft(rng)
    ways = [_some_changes(rng, draft) for _ in range(int(rng.integers(0, 12)))]
    costs = costs_after(draft, ways, draft.smooth_costs())
    assert costs.tolist() == pytest.approx([plain_search.cost_after(draft, changes) for changes in ways])


def _some_changes(rng: np.random.Generator, draft: Draft) -> Changes:
    """Up to four, of any units and hosts, each of a place once."""
    held = draft.held_UN
    places = rng.permutation(held.size)[: int(rng.integers(1, 5))]
    return tuple((int(at // held.shape[1]), int(at % held.shape[1]), not held.flat[at]) for at in places.tolist())
