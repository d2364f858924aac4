"""The desired set changes by copies, drops and folds; nothing is ever wanted less often than configured."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import ClusterConfig
from cluster.desired import desired_replicas
from cluster.desired_set import DesiredSet, Footprint, MoveRefused
from cluster.ids import NodeId, ReplicaId
from cluster.replica_names import Held, free_name, read_name, replica_name

LAYERS, EXPERTS = 6, 8


def a_set(*, replicas: int = 1, size: int = 1) -> DesiredSet:
    config = ClusterConfig(model="/m", replicas=replicas, experts_per_actor=size)
    made = desired_replicas(config, num_layers=LAYERS, num_experts=EXPERTS, experts_on_gpu=False)
    footprint = Footprint(base_bytes=100, host_layer_bytes=10, layer_bytes=10)
    return DesiredSet(num_layers=LAYERS, num_experts=EXPERTS, min_copies=replicas, footprint=footprint, replicas=made)


@pytest.mark.parametrize(
    ("experts", "layers", "name"),
    [
        ((3,), None, "expert-3-r2"),
        ((0, 1, 2, 3), None, "experts-0-3-r2"),
        ((0, 1, 4), None, "experts-0-1+4-r2"),
        ((7, 2), range(4, 6), "experts-2+7-l4-5-r2"),
        ((5,), range(1), "expert-5-l0-0-r2"),
    ],
)
def test_a_name_says_what_is_inside(experts: tuple[int, ...], layers: range | None, name: str) -> None:
    assert replica_name(experts, layers, 2) == name
    assert read_name(ReplicaId(name)) == Held(tuple(sorted(experts)), layers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    ["expert-3-r0-stand-in", "expert-3", "expert--r0", "experts-3-1-r0", "expert-1-l5-4-r0", "experts-1+1-r0", ""],
)
def test_other_names_say_nothing(name: str) -> None:
    assert read_name(ReplicaId(name)) is None


def test_a_free_name_has_the_lowest_number_that_nobody_has() -> None:
    taken = {ReplicaId("expert-3-r0"), ReplicaId("expert-3-r2")}
    assert free_name([3], None, taken) == "expert-3-r1"
    assert free_name([3], range(2), taken) == "expert-3-l0-1-r0"


def test_a_copy_has_a_name_a_place_and_its_size() -> None:
    after, name = a_set().copy(3, range(LAYERS), NodeId("n1"), taken=[ReplicaId("expert-3-r1")])
    assert name == "expert-3-r2"
    made = after.get(name)
    assert (made.node_id, made.memory_bytes, made.num_layers) == ("n1", 100 + 60, LAYERS)
    half, name = after.copy(3, range(2, 4), NodeId("n2"))
    assert name == "expert-3-l2-3-r0"
    assert half.get(name).memory_bytes == 100 + 20
    assert half.copies_LE[:, 3].tolist() == [2, 2, 3, 3, 2, 2]


def test_what_is_dropped_of_a_group_leaves_the_rest() -> None:
    groups = a_set(size=4).copy(1, range(LAYERS), NodeId("n1"))[0]
    after, made = groups.drop(ReplicaId("experts-0-3-r0"), 1, range(2, 4), NodeId("n0"))
    assert made == ("experts-0-3-l0-1-r0", "experts-0+2-3-l2-3-r0", "experts-0-3-l4-5-r0")
    assert {after.get(one).node_id for one in made} == {"n0"}
    assert (after.copies_LE == np.where(np.arange(EXPERTS) == 1, 2, 1) - _at(2, 4, 1)).all()
    whole, made = groups.drop(ReplicaId("experts-0-3-r0"), 1, range(LAYERS), None)
    assert made == ("experts-0+2-3-r0",)
    assert (whole.copies_LE == 1).all()


def _at(first: int, last: int, expert: int) -> np.ndarray:
    marked = np.zeros((LAYERS, EXPERTS), np.int64)
    marked[first:last, expert] = 1
    return marked


def test_as_many_copies_stay_as_are_configured() -> None:
    both = a_set(replicas=2)
    with pytest.raises(MoveRefused, match=r"one of 2 copies of expert 0, of which at least 2 must stay \(replicas\)"):
        both.drain(ReplicaId("expert-0-r0"))
    third, name = both.copy(0, range(LAYERS), NodeId("n2"))
    assert third.drain(ReplicaId("expert-0-r0")).ids == both.ids - {"expert-0-r0"} | {name}
    with pytest.raises(MoveRefused, match="the last copy of expert 5"):
        a_set().drop(ReplicaId("expert-5-r0"), 5, range(2), None)
    with pytest.raises(MoveRefused, match="expert-5-r0 does not hold expert 6"):
        a_set().drop(ReplicaId("expert-5-r0"), 6, range(2), None)
    half = both.copy(0, range(3), NodeId("n2"))[0]
    with pytest.raises(MoveRefused, match="one of 2 copies"):
        half.drain(ReplicaId("expert-0-r0"))


@pytest.mark.parametrize(("expert", "layers"), [(-1, range(2)), (8, range(2)), (0, range(0)), (0, range(5, 7))])
def test_places_that_there_are_not(expert: int, layers: range) -> None:
    with pytest.raises(MoveRefused, match=r"there is no expert|are not within 0-5"):
        a_set().copy(expert, layers, NodeId("n0"))


def test_folding_and_unfolding() -> None:
    one = a_set(replicas=2)
    four = one.copy(7, range(LAYERS), NodeId("n9"))[0].fold(4)
    assert four.ids == {f"experts-{2 * g}-{2 * g + 1}-r{c}" for g in range(4) for c in range(2)}
    assert {r.node_id for r in four.replicas} == {None}
    assert four.fold(4) == four, "who is there stays"
    assert four.fold(1).ids == {"experts-0-7-r0", "experts-0-7-r1"}
    assert four.fold(8, taken=one.ids).ids == {f"expert-{e}-r{c}" for e in range(8) for c in (2, 3)}
    for wrong in (0, 3, 16, -1):
        with pytest.raises(MoveRefused, match="8 experts do not come out even"):
            one.fold(wrong)


def test_a_new_supervisor_reads_it_from_the_names() -> None:
    base = a_set()
    changed = base.copy(3, range(LAYERS), NodeId("n1"))[0].drain(ReplicaId("expert-3-r0"))
    changed = changed.copy(0, range(3), NodeId("n2"))[0]
    assert base.rebuilt(changed.ids).ids == changed.ids
    assert base.rebuilt(base.fold(2).ids).ids == {"experts-0-3-r0", "experts-4-7-r0"}
    assert base.rebuilt([]) == base
    crashed = [name for name in changed.ids if name != "expert-5-r0"]
    assert base.rebuilt(crashed).ids == changed.ids, "who is just being started again is wanted, too"
    strangers = ["expert-1-r0-stand-in", "expert-9-r0", "expert-1-l0-9-r0", "what is this"]
    assert base.rebuilt(map(ReplicaId, strangers)).ids == base.ids


def test_a_node_that_is_gone_keeps_nobody_waiting() -> None:
    base, copy = a_set().copy(3, range(LAYERS), NodeId("n1"))
    first = ReplicaId("expert-3-r0")
    assert base.released(["n2"], {first: NodeId("n0")}) is base
    assert base.released(["n1"], {}).ids == a_set().ids, "there is another one"
    assert base.released(["n0"], {first: NodeId("n0")}).ids == base.ids - {first}, "as good as the other"
    alone = base.drain(first).released(["n1"], {})
    assert alone.get(copy).node_id is None, "it is needed, and may be anywhere"
    both = a_set(replicas=2)
    assert both.released(["n0"], {first: NodeId("n0")}).ids == both.ids, "as many as are configured"


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["copy", "drop", "drain", "fold", "lose", "rebuild"]),
        st.integers(0, 1 << 30),
        st.integers(0, 1 << 30),
        st.integers(0, 3),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(CHANGES, st.integers(1, 2), st.sampled_from([1, 2, 4]))
def test_whatever_is_done_everything_is_wanted_often_enough(
    changes: list[tuple[str, int, int, int]], replicas: int, size: int
) -> None:
    now = a_set(replicas=replicas, size=size)
    for kind, one, other, node in changes:
        victim = now.replicas[one % len(now.replicas)]
        first = other % LAYERS
        layers = range(first, first + 1 + one % (LAYERS - first))
        try:
            if kind == "copy":
                now, _ = now.copy(one % EXPERTS, layers, NodeId(f"n{node}"))
            elif kind == "drop":
                expert = victim.expert_ids[other % len(victim.expert_ids)]
                now, _ = now.drop(victim.replica_id, expert, layers, victim.node_id)
            elif kind == "drain":
                now = now.drain(victim.replica_id)
            elif kind == "fold":
                now = now.fold(1 << node)
            elif kind == "lose":
                now = now.released([NodeId(f"n{node}")], {victim.replica_id: NodeId(f"n{node}")})
            else:
                assert now.rebuilt(now.ids).ids == now.ids
        except MoveRefused as error:
            assert str(error)  # noqa: PT017 - a refusal is an answer like others here
        assert (now.copies_LE >= replicas).all(), kind
        assert len(now.ids) == len(now.replicas), "every name once"
        for replica in now.replicas:
            held = read_name(replica.replica_id)
            assert held is not None
            assert held.expert_ids == replica.expert_ids
            assert (held.layers or range(LAYERS)) == now.layers_of(replica)


def test_who_moves_off_a_node_is_made_anew_anywhere() -> None:
    before = a_set()
    places = {one.replica_id: NodeId(f"n{one.expert_ids[0] % 2}") for one in before.replicas}
    after = before.moved_off(NodeId("n1"), places, taken=[ReplicaId("expert-3-r1")])
    assert after.ids - before.ids == {"expert-1-r1", "expert-3-r2", "expert-5-r1", "expert-7-r1"}
    assert before.ids - after.ids == {"expert-1-r0", "expert-3-r0", "expert-5-r0", "expert-7-r0"}
    assert all(after.get(name).node_id is None for name in after.ids)
    assert (after.copies_LE == 1).all()
    assert after.moved_off(NodeId("n7"), places) == after, "nobody is there"


def test_what_enough_others_hold_is_not_made_anew() -> None:
    before, more = a_set().copy(3, range(LAYERS), NodeId("n1"))
    after = before.moved_off(NodeId("n1"), {})
    assert after.ids == a_set().ids, "the place that it names counts, too"
    places = {ReplicaId("expert-3-r0"): NodeId("n0")}
    assert before.moved_off(NodeId("n0"), places).ids == before.ids - {"expert-3-r0"}
    assert more == "expert-3-r1"
