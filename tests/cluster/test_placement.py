"""Replicas are spread, copies kept apart, and nothing is moved."""

from collections import Counter
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.desired import DesiredReplica
from cluster.ids import CoordinatorId, ExpertId, LayerId, NodeId, ReplicaId
from cluster.placement import NodeSlots, PlacementError, place, place_coordinators, with_nodes


def node(name: str, *, gpu: float = 0, cpu: float = 4, memory: int = 100) -> NodeSlots:
    return NodeSlots(node_id=NodeId(name), gpu=gpu, cpu=cpu, memory_bytes=memory)


def replica(expert: int, copy: int = 0, *, gpu: float = 0, memory: int = 10) -> DesiredReplica:
    return DesiredReplica(
        replica_id=ReplicaId(f"expert-{expert}-r{copy}"),
        expert_ids=(ExpertId(expert),),
        first_layer=LayerId(0),
        num_layers=1,
        gpu=gpu,
        memory_bytes=memory,
    )


def replicas(experts: int, copies: int = 1, *, gpu: float = 0, memory: int = 10) -> list[DesiredReplica]:
    return [replica(e, c, gpu=gpu, memory=memory) for e in range(experts) for c in range(copies)]


def shared(placement: dict[ReplicaId, NodeId], wanted: list[DesiredReplica]) -> int:
    """Pairs of copies of one expert on one node."""
    held = Counter((placement[r.replica_id], r.expert_ids) for r in wanted if r.replica_id in placement)
    return sum(count * (count - 1) // 2 for count in held.values())


def test_one_node_takes_all_that_fit() -> None:
    assert set(place(replicas(8), [node("n0")], {}).values()) == {"n0"}


@pytest.mark.parametrize(("nodes", "each"), [(2, 4), (4, 2), (8, 1)])
def test_experts_are_spread_evenly(nodes: int, each: int) -> None:
    placement = place(replicas(8), [node(f"n{i}") for i in range(nodes)], {})
    assert set(Counter(placement.values()).values()) == {each}
    assert len(set(placement.values())) == nodes


def test_copies_go_to_different_nodes() -> None:
    wanted = replicas(8, 2)
    placement = place(wanted, [node("n0"), node("n1")], {})
    assert shared(placement, wanted) == 0
    assert Counter(placement.values()) == {"n0": 8, "n1": 8}


def test_copies_are_apart_in_a_cluster_that_is_full() -> None:
    wanted = replicas(3, 2, memory=50)
    placement = place(wanted, [node("n0"), node("n1"), node("n2")], {})
    assert shared(placement, wanted) == 0
    assert Counter(placement.values()) == {"n0": 2, "n1": 2, "n2": 2}


def test_copies_share_a_node_rather_than_not_being_placed() -> None:
    wanted = replicas(4, 2)
    placement = place(wanted, [node("n0", memory=80), node("n1", memory=10)], {})
    assert len(placement) == 8


def test_unequal_nodes_are_filled_by_share() -> None:
    placement = place(replicas(12), [node("big", memory=200), node("small", memory=100)], {})
    assert Counter(placement.values()) == {"big": 8, "small": 4}


def test_gpus_are_slots() -> None:
    nodes = [node("n0", gpu=4, memory=10_000), node("n1", gpu=2, memory=10_000), node("cpu", memory=10_000)]
    assert Counter(place(replicas(6, gpu=1), nodes, {}).values()) == {"n0": 4, "n1": 2}
    with pytest.raises(PlacementError, match="gpu 1 wanted, 0 free"):
        place(replicas(7, gpu=1), nodes, {})
    assert Counter(place(replicas(8, gpu=0.25), nodes[1:], {}).values()) == {"n1": 8}


def test_what_is_placed_stays_even_where_it_is_crowded() -> None:
    wanted = replicas(4)
    current = {r.replica_id: NodeId("n0") for r in wanted}
    assert place(wanted, [node("n0", memory=20), node("n1")], current) == current


def test_newcomers_make_up_for_what_is_placed() -> None:
    wanted = replicas(6)
    current = {r.replica_id: NodeId("n0") for r in wanted[:3]}
    placement = place(wanted, [node("n0"), node("n1")], current)
    assert Counter(placement.values()) == {"n0": 3, "n1": 3}


def test_replicas_of_a_lost_node_are_placed_anew_and_strangers_are_forgotten() -> None:
    wanted = replicas(2)
    current = {wanted[0].replica_id: NodeId("gone"), ReplicaId("not wanted"): NodeId("n0")}
    assert place(wanted, [node("n0")], current) == {r.replica_id: "n0" for r in wanted}


def test_what_fits_nowhere_is_said_and_the_rest_is_placed() -> None:
    wanted = [*replicas(2), replica(9, memory=500)]
    with pytest.raises(PlacementError) as caught:
        place(wanted, [node("n0")], {})
    assert str(caught.value).startswith("expert-9-r0 fits on no node: memory_bytes 500 wanted, 100 free on n0")
    assert list(caught.value.unplaced) == ["expert-9-r0"]
    assert set(caught.value.placed) == {"expert-0-r0", "expert-1-r0"}
    with pytest.raises(PlacementError, match="there is no node, and 1 more"):
        place(replicas(2), [], {})


SIZES = st.lists(st.integers(1, 4), min_size=2, max_size=3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SIZES, st.integers(1, 4), st.integers(1, 2), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_and_copies_are_apart_wherever_that_is_possible(
    slots: list[int], experts: int, copies: int, random: Random
) -> None:
    wanted = replicas(experts, copies, memory=1)
    nodes = [node(f"n{i}", memory=size) for i, size in enumerate(slots)]
    if len(wanted) > sum(slots):
        with pytest.raises(PlacementError):
            place(wanted, nodes, {})
        return
    placement = place(wanted, nodes, {})
    assert place(random.sample(wanted, len(wanted)), random.sample(nodes, len(nodes)), {}) == placement
    assert place(wanted, nodes, placement) == placement, "a second time, nothing moves"
    used = Counter(placement.values())
    assert all(used[n.node_id] <= n.memory_bytes for n in nodes)
    best = min(
        shared(candidate, wanted)
        for choice in product([n.node_id for n in nodes], repeat=len(wanted))
        if all(choice.count(n.node_id) <= n.memory_bytes for n in nodes)
        for candidate in [dict(zip([r.replica_id for r in wanted], choice, strict=True))]
    )
    assert shared(placement, wanted) == best


def test_nodes_are_filled_in() -> None:
    made = with_nodes(replicas(2), {ReplicaId("expert-1-r0"): NodeId("n7")})
    assert [r.node_id for r in made] == [None, "n7"]


def ids(count: int) -> list[CoordinatorId]:
    return [CoordinatorId(f"coordinator-{i}") for i in range(count)]


def test_a_coordinator_goes_where_there_are_fewest_experts() -> None:
    experts = {ReplicaId(str(i)): NodeId("n0" if i < 5 else "n1") for i in range(8)}
    assert place_coordinators(ids(1), [node("n0"), node("n1")], experts, {}) == {"coordinator-0": "n1"}
    free = [node("n0"), node("n1"), node("n2")]
    assert place_coordinators(ids(1), free, experts, {}) == {"coordinator-0": "n2"}


def test_coordinators_keep_apart_and_stay() -> None:
    nodes = [node("n0", cpu=2), node("n1", cpu=16)]
    first = place_coordinators(ids(2), nodes, {}, {})
    assert first == {"coordinator-0": "n1", "coordinator-1": "n0"}
    assert place_coordinators(ids(2), [*nodes, node("n2", cpu=64)], {}, first) == first
    moved = place_coordinators(ids(2), nodes[:1], {}, first)
    assert moved == {"coordinator-0": "n0", "coordinator-1": "n0"}


def test_a_coordinator_needs_a_node() -> None:
    with pytest.raises(ValueError, match="there is no node for a coordinator"):
        place_coordinators(ids(1), [], {}, {})
