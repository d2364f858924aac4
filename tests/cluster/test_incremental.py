"""The incremental policy: rules kept whatever comes, nothing for noise, little for a shift, and it comes to rest."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ids import NodeId
from cluster.incremental import Incremental
from cluster.layout import FloatArray, Grain, Host, Layout, critical_share
from cluster.mending import copies_floor
from cluster.policy import Action, Copy, Drop, Observation, apply, moved_bytes
from tests.support.layouts import hosts, layout, settle, watched, within


def share(at: Layout, work_LE: FloatArray) -> float:
    return critical_share(at.busy_LN(work_LE))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Layout, FloatArray, np.random.Generator]:
    """A model, hosts that can hold it, and a random layout on them that need not be complete."""
    num_layers, num_experts = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    grain = Grain.even(num_layers, num_experts, num_ranges=draw(st.integers(1, min(3, num_layers))), layer_bytes=10)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_hosts = draw(st.integers(1, 8))
    slots = rng.integers(0, grain.num_units + 1, num_hosts)
    while slots.sum() < grain.num_units:
        slots[rng.integers(num_hosts)] += 1
    memory = [int(s) * int(grain.bytes_U.max()) + int(rng.integers(0, 10)) for s in slots]
    on = tuple(
        Host(node_id=NodeId(f"n{i}"), slots=int(slots[i]), memory_bytes=memory[i], speed=float(rng.choice([0.5, 1, 2])))
        for i in range(num_hosts)
    )
    held = np.zeros((grain.num_units, num_hosts), np.bool_)
    for unit, host in rng.permutation(list(product(range(grain.num_units), range(num_hosts)))):
        held[unit, host] = rng.random() < 0.4 and held[:, host].sum() < slots[host]
    work_LE = rng.dirichlet(np.full(num_experts, 0.7), num_layers) * rng.choice([0.01, 0.2, 1.0])
    return Layout(grain, on, held), work_LE, rng


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_rule_holds_after_every_action_through_failures_and_shifts(
    case: tuple[Layout, FloatArray, np.random.Generator],
) -> None:
    now, work_LE, rng = case
    budget = int(now.grain.bytes_U.max()) * int(rng.integers(1, 4))
    policy = Incremental(budget_bytes=budget)
    state = None
    for step in range(6):
        lost = now.copies_U == 0
        actions, state = policy(Observation(now_s=step * 10.0, layout=now, work_LE=work_LE), state)
        was_empty = not now.held_UN.any()
        now = watched(now, actions)
        unserved = sum(a.num_bytes for a in actions if isinstance(a, Copy) and (lost[a.unit] and a.source is None))
        if not was_empty:
            assert moved_bytes(actions) - unserved <= budget
        assert (now.copies_U >= 1).all(), "a unit is served by nobody"
        if step == 2:
            able = [n for n in range(len(now.hosts)) if _fits(now, n)]
            if able:
                gone = int(rng.choice(able))
                now = now.on([h for i, h in enumerate(now.hosts) if i != gone])
        if step == 4:
            work_LE = work_LE * rng.uniform(0.2, 5.0, work_LE.shape)


def _fits(at: Layout, without: int) -> bool:
    return sum(h.slots for n, h in enumerate(at.hosts) if n != without) >= at.grain.num_units


@settings(max_examples=100, deadline=None)
@given(cases())
def test_it_comes_to_rest_on_two_nodes_each_where_slots_allow(
    case: tuple[Layout, FloatArray, np.random.Generator],
) -> None:
    start, work_LE, _ = case
    policy = Incremental(budget_bytes=int(start.grain.bytes_U.max()) * 4)
    rest, _, _ = settle(policy, start, work_LE, rounds=200)
    assert (rest.copies_U >= copies_floor(rest)).all()


@settings(max_examples=60, deadline=None)
@given(cases())
def test_noise_of_five_percent_moves_nothing(case: tuple[Layout, FloatArray, np.random.Generator]) -> None:
    start, work_LE, rng = case
    policy = Incremental(budget_bytes=int(start.grain.bytes_U.max()) * 4)
    rest, state, _ = settle(policy, start, work_LE, rounds=200)
    for step in range(10):
        noisy = work_LE * rng.uniform(0.95, 1.05, work_LE.shape)
        actions, state = policy(Observation(now_s=1e6 + step, layout=rest, work_LE=noisy), state)
        assert actions == ()


@settings(max_examples=60, deadline=None)
@given(cases(), st.floats(0.9, 1.0))
def test_noise_about_the_share_at_which_balancing_begins_moves_nothing(
    case: tuple[Layout, FloatArray, np.random.Generator], part: float
) -> None:
    start, work_LE, rng = case
    policy = Incremental(budget_bytes=int(start.grain.bytes_U.max()) * 4)
    rest, _, _ = settle(policy, start, work_LE, rounds=200)
    work_LE = work_LE * part * policy.busy_share / critical_share(rest.busy_LN(work_LE))
    rest, state, _ = settle(policy, rest, work_LE, rounds=200)
    for step in range(20):
        noisy = work_LE * rng.uniform(0.95, 1.05, work_LE.shape)
        actions, state = policy(Observation(now_s=1e6 + step, layout=rest, work_LE=noisy), state)
        assert actions == ()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(3, 4), st.integers(3, 5), st.integers(1, 3))
def test_a_doubled_expert_moves_at_most_what_the_optimum_needs_and_one_more(
    seed: int, num_hosts: int, num_experts: int, num_layers: int
) -> None:
    rng = np.random.default_rng(seed)
    grain = Grain.even(num_layers, num_experts, layer_bytes=1)
    slots = rng.integers(2, 4, num_hosts)
    while slots.sum() < 2 * num_experts:
        slots += 1
    work_LE = rng.dirichlet(np.full(num_experts, 3.0), num_layers)
    policy = Incremental(budget_bytes=100, max_moves=8)
    rest, state, _ = settle(policy, Layout.empty(grain, hosts(num_hosts, slots.tolist())), work_LE)
    work_LE[:, rng.integers(num_experts)] *= 2
    now, num = rest, 0
    for step in range(20):
        actions, state = policy(Observation(now_s=1e6 + step, layout=now, work_LE=work_LE), state)
        if not actions:
            break
        now = watched(now, actions)
        num += sum(isinstance(action, Copy) for action in actions)
    # No layout that is two loads nearer would have been as good.
    assert all(share(other, work_LE) > share(now, work_LE) + 1e-9 for other in within(rest, num - 2))


@pytest.mark.parametrize(
    ("held", "work"),
    [
        # A spare copy on the busiest host must go for one of a unit that is elsewhere; exchanges took four loads.
        (
            [[1, 1, 1, 0], [1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]],
            [[0.33, 0.32, 0.08, 0.10, 0.34]],
        ),
        # Here the host for the copy is no less busy than others until its spare one has left: three loads before.
        (
            [[1, 0, 1, 0], [1, 1, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 0, 1]],
            [[0.14, 0.45, 0.15, 0.07, 0.27], [0.19, 0.27, 0.58, 0.05, 0.20], [0.07, 0.30, 0.50, 0.32, 0.07]],
        ),
        (
            [[1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]],
            [[0.28, 0.04, 0.29, 0.54], [0.23, 0.08, 0.60, 0.39]],
        ),
    ],
)
def test_a_copy_in_the_place_of_a_spare_one_is_found_where_others_take_more_loads(
    held: list[list[int]], work: list[list[float]]
) -> None:
    grain = Grain.even(len(work), len(held), layer_bytes=1)
    pairs = [(unit, host) for unit, row in enumerate(held) for host, there in enumerate(row) if there]
    full = hosts(4, [sum(row[host] for row in held) for host in range(4)])
    start, work_LE = layout(grain, full, pairs), np.array(work)
    end, _, num_bytes = settle(Incremental(budget_bytes=100, max_moves=8), start, work_LE)
    assert num_bytes == len(work), "more than one load"
    assert share(end, work_LE) == pytest.approx(min(share(other, work_LE) for other in within(start, 1)))


@pytest.mark.parametrize(
    ("choosiness", "choosy_gain", "moves"),
    [(0.0, 0.9, 1), (4.0, 0.9, 1), (5.0, 0.9, 0), (5.0, 0.02, 1), (5.0, 0.03, 0)],
)
def test_where_few_copies_share_a_large_imbalance_a_move_must_gain_more(
    choosiness: float, choosy_gain: float, moves: int
) -> None:
    # Of 21 % imbalance, on nine copies, the best move takes 2.4 % of the wait: as much as a choosiness of 4.6 asks for.
    held = [[1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]]
    work_LE = np.array([[0.28, 0.04, 0.29, 0.54], [0.23, 0.08, 0.60, 0.39]])
    pairs = [(unit, host) for unit, row in enumerate(held) for host, there in enumerate(row) if there]
    start = layout(Grain.even(2, 4, layer_bytes=1), hosts(4, [2, 2, 2, 3]), pairs)
    policy = Incremental(budget_bytes=100, choosiness=choosiness, choosy_gain=choosy_gain)
    actions, _ = policy(Observation(now_s=0, layout=start, work_LE=work_LE), None)
    assert sum(isinstance(action, Copy) for action in actions) == moves


def test_a_hot_expert_gets_copies_on_other_nodes_and_the_reason_says_so() -> None:
    grain = Grain.even(4, 8, layer_bytes=10)
    on = hosts(8, 3)
    start = layout(grain, on, [(e, (e + c) % 8) for e in range(8) for c in range(2)])
    work_LE = np.full((4, 8), 0.02)
    work_LE[:, 3] = 0.16
    actions, _ = Incremental(budget_bytes=1000)(Observation(now_s=0, layout=start, work_LE=work_LE), None)
    copies = [a for a in actions if isinstance(a, Copy)]
    assert {a.unit for a in copies} == {3}
    assert copies[0].source in ("n3", "n4")
    assert "times as busy as the mean" in copies[0].reason
    assert "most of it with expert 3; the wait for the busiest hosts goes from 36.0% to" in copies[0].reason
    assert share(watched(start, actions), work_LE) < 0.7 * share(start, work_LE)


def test_the_budget_spreads_moves_over_rounds_and_the_sum_is_the_same() -> None:
    grain = Grain.even(2, 8, layer_bytes=10)
    start = layout(grain, hosts(8, 3), [(e, (e + c) % 8) for e in range(8) for c in range(2)])
    work_LE = np.full((2, 8), 0.05)
    work_LE[:, 3] = 0.5
    rich, _, _ = settle(Incremental(budget_bytes=1000), start, work_LE)
    now, state, rounds = start, None, 0
    poor = Incremental(budget_bytes=20)
    while True:
        actions, state = poor(Observation(now_s=rounds, layout=now, work_LE=work_LE), state)
        if not actions:
            break
        assert moved_bytes(actions) == 20
        now, rounds = watched(now, actions), rounds + 1
    assert rounds > 1
    assert share(now, work_LE) == pytest.approx(share(rich, work_LE), rel=0.1)


def test_few_searches_in_a_round_begin_few_ranges_and_every_range_has_its_turn() -> None:
    grain = Grain.even(6, 8, num_ranges=6, layer_bytes=10)
    held = [(which * 8 + e, (which + e + c) % 8) for which in range(6) for e in range(8) for c in range(2)]
    start = layout(grain, hosts(8, 18), held)
    work_LE = np.full((6, 8), 0.03)
    work_LE[np.arange(6), [3, 1, 4, 1, 5, 2]] = 0.3
    many, _, _ = settle(Incremental(budget_bytes=10_000, max_searches=100), start, work_LE)
    few = Incremental(budget_bytes=10_000, max_searches=1)
    now, state, order = start, None, []
    while True:
        actions, state = few(Observation(now_s=10.0 * len(order), layout=now, work_LE=work_LE), state)
        if not actions and len(order) >= 6:
            break
        begun = {a.unit // 8 for a in actions if isinstance(a, Copy | Drop)}
        assert len(begun) <= 1
        order.append(begun)
        now = watched(now, actions)
        assert len(order) < 60
    assert set().union(*order) == set(range(6))
    assert share(now, work_LE) == pytest.approx(share(many, work_LE), rel=0.05)


def test_a_lost_node_is_made_good_before_anything_else() -> None:
    grain = Grain.even(2, 4, layer_bytes=10)
    start = layout(grain, hosts(5, 2), [(e, e) for e in range(4)] + [(e, (e + 1) % 4) for e in range(4)])
    left = start.on([h for h in start.hosts if h.node_id != "n1"])
    seen = Observation(now_s=0, layout=left, work_LE=np.full((2, 4), 0.01))
    actions, _ = Incremental(budget_bytes=100)(seen, None)
    after = watched(left, actions)
    assert (after.copies_U == 2).all()
    assert {(a.unit, a.node_id) for a in actions if isinstance(a, Copy)} == {(0, "n4"), (1, "n4")}
    assert all("it is on one node only" in a.reason for a in actions)


def test_what_nobody_serves_is_loaded_from_disk_whatever_the_budget() -> None:
    grain = Grain.even(1, 4, layer_bytes=10)
    start = layout(grain, hosts(2, 4), [(0, 0)])
    actions, _ = Incremental(budget_bytes=10)(Observation(now_s=0, layout=start, work_LE=np.ones((1, 4))), None)
    assert [(a.unit, a.source) for a in actions if isinstance(a, Copy)] == [(1, None), (2, None), (3, None)]


def test_a_full_host_gives_up_a_spare_copy_and_another_unit_moves_out_of_the_way() -> None:
    grain = Grain.even(1, 3, layer_bytes=1)
    spare = layout(grain, hosts(3, [2, 1, 2]), [(0, 0), (0, 1), (0, 2), (1, 0)])
    after = watched(spare, Incremental(budget_bytes=9)(_idle(spare), None)[0])
    assert (after.copies_U >= 1).all()
    # Unit 2 is on n0 only, where the free slots are; n1 and n2 are full of what n0 has not.
    stuck = layout(grain, hosts(3, [3, 1, 2]), [(2, 0), (0, 1), (0, 2), (1, 2), (1, 0)])
    after = watched(stuck, Incremental(budget_bytes=9)(_idle(stuck), None)[0])
    assert after.copies_U.tolist() == [2, 2, 2]


def test_a_draining_host_is_emptied_without_ever_leaving_a_unit_alone() -> None:
    grain = Grain.even(1, 4, layer_bytes=1)
    on = list(hosts(3, 4))
    on[0] = Host(node_id=NodeId("n0"), slots=4, memory_bytes=100, draining=True)
    start = layout(grain, on, [(e, 0) for e in range(4)] + [(e, 1) for e in range(4)])
    now, _, _ = settle(Incremental(budget_bytes=2), start, np.full((1, 4), 0.01))
    assert now.held_UN.sum(axis=0).tolist() == [0, 4, 4]


def test_spare_copies_go_when_the_load_has_gone_and_do_not_come_back() -> None:
    grain = Grain.even(2, 4, layer_bytes=1)
    start = layout(grain, hosts(6, 2), [(e, n) for e in range(4) for n in range(e, e + 3)])
    now, _, num_bytes = settle(Incremental(budget_bytes=9), start, np.full((2, 4), 1e-4))
    assert (now.copies_U == 2).all()
    assert num_bytes == 0


def test_forbidden_places_are_not_used() -> None:
    grain = Grain.even(1, 2, layer_bytes=1)
    start = layout(grain, hosts(3, 2), [(0, 0), (1, 0)])
    forbidden = frozenset({(0, NodeId("n1")), (1, NodeId("n2"))})
    seen = Observation(now_s=0, layout=start, work_LE=np.ones((1, 2)), forbidden=forbidden)
    actions, _ = Incremental(budget_bytes=9)(seen, None)
    assert {(a.unit, a.node_id) for a in actions if isinstance(a, Copy)} == {(0, "n2"), (1, "n1")}


def test_asking_changes_nothing() -> None:
    grain = Grain.even(2, 4, layer_bytes=1)
    start = layout(grain, hosts(4, 2), [(e, e) for e in range(4)])
    before, work_LE = start.held_UN.copy(), np.full((2, 4), 0.1)
    policy, seen = Incremental(budget_bytes=9), Observation(now_s=0, layout=start, work_LE=work_LE)
    assert policy(seen, None)[0] == policy(seen, None)[0] != ()
    assert (start.held_UN == before).all()
    assert (work_LE == 0.1).all()


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"start_gain": 0.001}, "move_gain 0.002, stop_gain 0.003 and start_gain 0.001"),
        ({"choosiness": -0.1}, "choosiness -0.1"),
        ({"choosy_gain": 1.0}, "choosy_gain is 1.0"),
        ({"quiet_share": 0.5}, "quiet_share is 0.5"),
        ({"max_moves": 0}, "max_moves 0"),
        ({"max_searches": 0}, "max_searches 0"),
    ],
)
def test_contradictions_are_refused(settings_: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Incremental(budget_bytes=1, **settings_)  # type: ignore[arg-type]


def test_a_budget_below_one_unit_is_refused() -> None:
    start = Layout.empty(Grain.even(4, 2, layer_bytes=10), hosts(2))
    with pytest.raises(ValueError, match="budget_bytes is 39, but a unit has 40"):
        Incremental(budget_bytes=39)(_idle(start), None)


def _idle(at: Layout) -> Observation:
    return Observation(now_s=0, layout=at, work_LE=np.full((at.grain.num_layers, at.grain.num_experts), 1e-6))


def test_apply_ignores_actions_about_hosts() -> None:
    start = layout(Grain.even(1, 2), hosts(2), [(0, 0), (1, 1)])
    actions: list[Action] = [Drop(unit=0, node_id=NodeId("n0"), reason="test")]
    assert apply(start, actions).held_UN.tolist() == [[False, False], [False, True]]
