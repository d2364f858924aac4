"""A running cluster as policies see it, and their moves as changes of what is desired."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import ClusterConfig
from cluster.desired import desired_replicas
from cluster.desired_set import DesiredSet, Footprint, MoveRefused
from cluster.ids import NodeId, ReplicaId
from cluster.layout import Grain
from cluster.live_layout import Ground, check_room, copy_unit, drop_unit, layout_of, units_of
from cluster.placement import NodeSlots, place
from cluster.policies import policy_named
from cluster.policy import Copy, Drop, Observation, apply
from cluster.policy_check import checked, within_bounds

LAYERS, EXPERTS = 4, 4
WHOLE = Grain.even(LAYERS, EXPERTS, layer_bytes=10)
HALVES = Grain.even(LAYERS, EXPERTS, num_ranges=2, layer_bytes=10)


def a_set(*, replicas: int = 1, size: int = 1, gpu: float = 0.0) -> DesiredSet:
    config = ClusterConfig(model="/m", replicas=replicas, experts_per_actor=size)
    made = desired_replicas(config, num_layers=LAYERS, num_experts=EXPERTS, experts_on_gpu=False, memory_bytes=140)
    made = tuple(replace(one, gpu=gpu) for one in made)
    footprint = Footprint(gpu=gpu, base_bytes=100, host_layer_bytes=10, layer_bytes=10)
    return DesiredSet(num_layers=LAYERS, num_experts=EXPERTS, min_copies=replicas, footprint=footprint, replicas=made)


def node(name: str, *, memory: int = 1000, gpu: float = 0.0, cpu: float = 1.0) -> NodeSlots:
    return NodeSlots(node_id=NodeId(name), gpu=gpu, cpu=cpu, memory_bytes=memory)


def ground(places: Mapping[str, str], *nodes: NodeSlots, **more: object) -> Ground:
    where = {ReplicaId(one): NodeId(name) for one, name in places.items()}
    return Ground(nodes=nodes or (node("n0"), node("n1")), places=where, **more)  # type: ignore[arg-type]


SPREAD = {"expert-0-r0": "n0", "expert-1-r0": "n0", "expert-2-r0": "n1", "expert-3-r0": "n1"}


def copy(unit: int, name: str) -> Copy:
    return Copy(unit=unit, node_id=NodeId(name), source=None, num_bytes=40, reason="")


def test_replicas_hold_the_units_that_they_have_whole() -> None:
    desired, part = a_set().copy(0, range(1, 4), NodeId("n1"))
    assert units_of(desired.get(part), WHOLE) == []
    assert units_of(desired.get(part), HALVES) == [4], "layers 2 and 3 of expert 0"
    assert units_of(desired.get(ReplicaId("expert-1-r0")), HALVES) == [1, 5]
    group = a_set(size=2).get(ReplicaId("experts-2-3-r0"))
    assert units_of(group, HALVES) == [2, 3, 6, 7]


def test_hosts_hold_what_is_placed_there_and_take_what_fits() -> None:
    layout = layout_of(a_set(), WHOLE, ground(SPREAD, node("n0"), node("n1", memory=420), node("n2", memory=100)))
    assert [host.slots for host in layout.hosts] == [4, 3, 0], "5 more by memory, but there are 4 units; 1 more; none"
    assert layout.held_UN.tolist() == [[True, False, False]] * 2 + [[False, True, False]] * 2
    assert layout.copies_U.tolist() == [1, 1, 1, 1]
    nowhere = layout_of(a_set(), WHOLE, ground({"expert-0-r0": "n7"}))
    assert nowhere.copies_U.tolist() == [0, 0, 0, 0]


def test_gpus_and_slots_are_bounds_too() -> None:
    on = (node("n0", gpu=3.0), node("n1", gpu=2.0))
    layout = layout_of(a_set(gpu=1.0), WHOLE, ground(SPREAD, *on))
    assert layout.slots_free_N.tolist() == [1, 0]
    few = layout_of(a_set(), WHOLE, ground(SPREAD, expert_slots=1, draining=["n1"], speeds={"n0": 0.5}))
    assert few.slots_free_N.tolist() == [-1, -1]
    assert [(host.draining, host.speed) for host in few.hosts] == [(False, 0.5), (True, 1.0)]


def test_a_host_works_on_as_many_units_at_once_as_it_has_gpus_or_processors_for() -> None:
    on = (node("n0", cpu=8.0), node("n1", cpu=0.0, gpu=4.0))
    at_once = [host.parallelism for host in layout_of(a_set(), WHOLE, ground(SPREAD, *on, cpus_each=3)).hosts]
    assert at_once == [2, 1], "at least one"
    shared = layout_of(a_set(gpu=0.5), WHOLE, ground(SPREAD, *on))
    assert [host.parallelism for host in shared.hosts] == [1, 4], "two on one GPU wait for each other"


def test_a_copy_goes_only_where_it_may() -> None:
    at = ground(SPREAD, expert_slots=3)
    after, made = copy_unit(a_set(), copy(0, "n1"), at, WHOLE)
    assert after.get(made).node_id == "n1"
    refusals = [
        (copy(0, "n0"), at, "node n0 has expert 0 already"),
        (copy(0, "n5"), at, "no node 'n5' that answers"),
        (copy(0, "n1"), ground(SPREAD, expert_slots=2), "node n1 is full: it holds 2 of 2"),
        (copy(0, "n1"), ground(SPREAD, draining=["n1"]), "n1 is draining"),
    ]
    for action, where, words in refusals:
        with pytest.raises(MoveRefused, match=words):
            copy_unit(a_set(), action, where, WHOLE)


def test_memory_is_a_reason_of_its_own() -> None:
    layout = layout_of(a_set(), WHOLE, ground(SPREAD))
    poor = replace(layout, hosts=tuple(replace(host, memory_bytes=100) for host in layout.hosts))
    with pytest.raises(MoveRefused, match="n1 has 20 bytes left, expert 0 needs 40"):
        check_room(poor, 0, NodeId("n1"))


def test_a_drop_of_a_part_leaves_the_rest_where_it_was() -> None:
    desired, copied = a_set(size=2).copy(1, range(LAYERS), NodeId("n1"))
    at = ground({"experts-0-1-r0": "n0", "experts-2-3-r0": "n1", copied: "n1"})
    after, gone, made = drop_unit(desired, Drop(unit=5, node_id=NodeId("n0"), reason=""), at, HALVES)
    assert gone == ("experts-0-1-r0",)
    assert made == ("experts-0-1-l0-1-r0", "expert-0-l2-3-r0")
    assert [after.get(one).node_id for one in made] == ["n0", "n0"]
    with pytest.raises(MoveRefused, match="nobody on node n1 holds expert 0 in layers 0-1"):
        drop_unit(desired, Drop(unit=0, node_id=NodeId("n1"), reason=""), at, HALVES)
    with pytest.raises(MoveRefused, match="the last copy of expert 2"):
        drop_unit(desired, Drop(unit=2, node_id=NodeId("n1"), reason=""), at, HALVES)


LOADS = st.lists(st.lists(st.integers(0, 100), min_size=EXPERTS, max_size=EXPERTS), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(LOADS, st.lists(st.integers(1, 5), min_size=2, max_size=4), st.sampled_from([1, 2]), st.booleans(), st.data())
def test_a_policy_and_what_is_made_of_its_moves_agree_until_there_is_peace(
    loads: list[list[int]], slots: list[int], ranges: int, grouped: bool, data: st.DataObject
) -> None:
    """Random loads and slots, and a node lost on the way: one copy on a node, everything wanted, nothing flaps."""
    grain = Grain.even(LAYERS, EXPERTS, num_ranges=ranges, layer_bytes=10)
    nodes = [node(f"n{n}", memory=100_000) for n in range(len(slots))]
    desired = a_set(size=2 if grouped else 1)
    places = {one.replica_id: nodes[i % len(nodes)].node_id for i, one in enumerate(desired.replicas)}
    policy, state = policy_named("incremental", budget_bytes=1000), None
    lost = data.draw(st.integers(0, len(loads)))
    for step, load in enumerate(loads):
        if step == lost and len(nodes) > 2:
            gone = nodes.pop().node_id
            desired = desired.released([gone], places)
            places = place(desired.replicas, nodes, {r: n for r, n in places.items() if n != gone})
        work_LE = np.array([load] * LAYERS) / 250.0
        quiet = 0
        for round_ in range(40):
            at = Ground(nodes=tuple(nodes), places=places, expert_slots=max(slots) * ranges)
            layout = layout_of(desired, grain, at)
            seen = Observation(now_s=100.0 * step + round_, layout=layout, work_LE=work_LE)
            actions, state = checked(policy(seen, state), layout)
            actions = within_bounds(actions, layout, budget_bytes=1000, min_copies=1)
            for action in actions:
                at = Ground(nodes=tuple(nodes), places=places, expert_slots=max(slots) * ranges)
                if isinstance(action, Copy):
                    desired, made = copy_unit(desired, action, at, grain)
                    places[made] = action.node_id
                elif isinstance(action, Drop):
                    desired, _, rest = drop_unit(desired, action, at, grain)
                    places |= dict.fromkeys(rest, action.node_id)
                assert desired.copies_LE.min() >= 1
                assert one_on_a_node(desired, places)
            after = layout_of(desired, grain, Ground(nodes=tuple(nodes), places=places))
            assert (after.held_UN == apply(layout, actions).held_UN).all()
            quiet = 0 if actions else quiet + 1
            if quiet == 2:
                break
        assert quiet == 2, f"still moving: {actions}"


def one_on_a_node(desired: DesiredSet, places: Mapping[ReplicaId, NodeId]) -> bool:
    held: set[tuple[str, int, int]] = set()
    for one in desired.replicas:
        mine = {(places[one.replica_id], layer, e) for layer in desired.layers_of(one) for e in one.expert_ids}
        if held & mine:
            return False
        held |= mine
    return True
