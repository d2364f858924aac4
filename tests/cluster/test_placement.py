"""Replicas are spread, copies kept apart, and nothing is moved."""

from collections import Counter
from dataclasses import replace
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.desired import DesiredReplica
from cluster.ids import CoordinatorId, ExpertId, LayerId, NodeId, ReplicaId
from cluster.placement import (
    COORDINATOR_HOST,
    EXPERT_HOST,
    ZONE_LABEL,
    NodeSlots,
    PlacementError,
    is_role,
    place,
    place_coordinators,
    with_nodes,
)


def node(
    name: str, *, gpu: float = 0, cpu: float = 4, memory: int = 100, zone: str | None = None, role: str | None = None
) -> NodeSlots:
    return NodeSlots(
        node_id=NodeId(name),
        gpu=gpu,
        cpu=cpu,
        memory_bytes=memory,
        labels={} if zone is None else {ZONE_LABEL: zone},
        roles=frozenset() if role is None else frozenset({role}),
    )


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


@pytest.mark.parametrize("seed", range(20))
def test_copies_go_to_different_zones(seed: int) -> None:
    """Sixteen nodes that hold one replica each, eight in each of two zones, in whatever order they are listed."""
    nodes = [node(f"n{i:02}", gpu=1, zone=f"zone-{'ab'[i % 2]}") for i in Random(seed).sample(range(16), 16)]
    zones = {slots.node_id: slots.labels[ZONE_LABEL] for slots in nodes}
    wanted = replicas(8, 2, gpu=1)
    placement = place(wanted, nodes, {})
    for expert in range(8):
        assert len({zones[placement[ReplicaId(f"expert-{expert}-r{copy}")]] for copy in range(2)}) == 2


def test_a_full_zone_is_no_reason_to_have_one_copy_less() -> None:
    nodes = [node("a0", zone="a"), node("a1", zone="a"), node("b0", zone="b", memory=10)]
    placement = place(replicas(2, 2), nodes, {})
    assert len(placement) == 4
    assert shared(placement, replicas(2, 2)) == 0


def test_a_node_takes_only_what_it_is_for() -> None:
    nodes = [node("any"), node("experts", role=EXPERT_HOST), node("coordinators", role=COORDINATOR_HOST)]
    nodes.append(node("nobody", role="octavo_control_host", memory=10_000))
    assert set(place(replicas(8), nodes, {}).values()) == {"any", "experts"}
    assert [slots.node_id for slots in nodes if slots.takes(COORDINATOR_HOST)] == ["any", "coordinators"]
    stays = {ReplicaId("expert-0-r0"): NodeId("nobody")}
    assert place(replicas(1), nodes, stays) == stays, "what is placed stays"
    with pytest.raises(PlacementError, match="expert-0-r0 fits on no node: no node is for experts"):
        place(replicas(1), nodes[2:], {})
    with pytest.raises(PlacementError, match="expert-0-r0 fits on no node: no node answers"):
        place(replicas(1), nodes[1:], {}, shunned={NodeId("experts")})


def test_which_resources_are_roles() -> None:
    names = [EXPERT_HOST, COORDINATOR_HOST, "octavo_control_host", "CPU", "octavo_host", "my_octavo_expert_host"]
    assert [is_role(name) for name in names] == [True, True, True, False, False, False]


def test_after_a_loss_two_copies_on_the_last_node_are_better_than_one() -> None:
    wanted = replicas(4, 2)
    nodes = [node("n0"), node("n1")]
    before = place(wanted, nodes, {})
    survivors = {r: n for r, n in before.items() if n == "n0"}
    assert set(place(wanted, nodes[:1], survivors).values()) == {"n0"}
    third = [node("n0"), node("n2")]
    assert shared(place(wanted, third, survivors), wanted) == 0, "where there is another node, it is taken"


def test_nobody_new_goes_to_a_node_that_is_shunned_and_nobody_leaves_it() -> None:
    wanted = replicas(4, 2)
    nodes = [node("n0"), node("n1")]
    before = place(wanted, nodes, {})
    stays = {r: n for r, n in before.items() if n == "n1"}
    after = place(wanted, nodes, stays, shunned={NodeId("n1")})
    assert {r: n for r, n in after.items() if n == "n1"} == stays
    with pytest.raises(PlacementError, match="expert-0-r0 fits on no node: no node answers, and 7 more"):
        place(wanted, nodes, {}, shunned={NodeId("n0"), NodeId("n1")})


def test_who_lives_does_not_move_when_a_node_comes_back_but_the_next_one_goes_there() -> None:
    wanted = replicas(2, 2)
    crowded = place(wanted, [node("n0")], {})
    both = [node("n0"), node("n1")]
    assert place(wanted, both, crowded) == crowded
    lost_again = {r: n for r, n in crowded.items() if r != "expert-1-r1"}
    assert place(wanted, both, lost_again)[ReplicaId("expert-1-r1")] == "n1"


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


def test_who_names_a_node_goes_there_or_nowhere() -> None:
    wanted = [replace(replica(0), node_id=NodeId("n1")), replace(replica(1), node_id=NodeId("n1")), replica(2)]
    nodes = [node("n0"), node("n1", memory=10)]
    with pytest.raises(PlacementError, match="memory_bytes 10 wanted, 0 free on n1") as caught:
        place(wanted, nodes, {})
    assert caught.value.placed == {"expert-0-r0": "n1", "expert-2-r0": "n0"}
    with pytest.raises(PlacementError, match="n1 does not answer"):
        place(wanted[:1], nodes, {}, shunned={NodeId("n1")})
    with pytest.raises(PlacementError, match="n1 does not answer"):
        place(wanted[:1], nodes[:1], {})
    stays = place(wanted[:1], nodes, {wanted[0].replica_id: NodeId("n0")})
    assert stays == {"expert-0-r0": "n0"}, "who is somewhere already stays"


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
