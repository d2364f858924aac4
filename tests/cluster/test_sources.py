"""A new replica asks those that have most of what it needs, near ones first, and never itself or strangers."""

from cluster.desired import DesiredReplica
from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from cluster.sources import MAX_SOURCES, sources_for


def replica(name: str, experts: tuple[int, ...], layers: range, node: str = "n0") -> ReplicaInfo:
    return ReplicaInfo(
        replica_id=ReplicaId(name),
        expert_ids=tuple(map(ExpertId, experts)),
        first_layer=LayerId(layers.start),
        num_layers=len(layers),
        address=f"{name}:1",
        node_id=NodeId(node),
        numerics_domain="d",
    )


def target(experts: tuple[int, ...], layers: range, node: str | None = None, name: str = "new") -> DesiredReplica:
    return DesiredReplica(
        replica_id=ReplicaId(name),
        expert_ids=tuple(map(ExpertId, experts)),
        first_layer=LayerId(layers.start),
        num_layers=len(layers),
        node_id=None if node is None else NodeId(node),
    )


def map_of(*replicas: ReplicaInfo) -> ExpertMap:
    return ExpertMap(3, 8, 8, replicas)


def test_who_has_most_of_it_comes_first_and_who_has_nothing_not_at_all() -> None:
    known = map_of(
        replica("a", (0,), range(8)),
        replica("b", (1,), range(4)),
        replica("c", (1,), range(3, 8)),
        replica("d", (1, 2), range(8)),
        replica("e", (2, 3), range(8)),
    )
    assert sources_for(target((1,), range(8)), known) == ("d:1", "c:1", "b:1")
    assert sources_for(target((1, 2), range(8)), known) == ("d:1", "e:1", "c:1", "b:1")
    assert sources_for(target((1,), range(2)), known) == ("b:1", "d:1")
    assert sources_for(target((4,), range(8)), known) == ()


def test_of_equals_the_near_one_and_then_by_id_and_a_bounded_number() -> None:
    known = map_of(*(replica(f"r{number}", (0,), range(8), node=f"n{number}") for number in range(9)))
    assert sources_for(target((0,), range(8)), known) == ("r0:1", "r1:1", "r2:1", "r3:1")
    assert sources_for(target((0,), range(8), node="n7"), known) == ("r7:1", "r0:1", "r1:1", "r2:1")
    assert len(sources_for(target((0,), range(8)), known, 100)) == 9 > MAX_SOURCES


def test_its_own_former_life_is_no_source() -> None:
    known = map_of(replica("new", (0,), range(8)), replica("old", (0,), range(8)))
    assert sources_for(target((0,), range(8)), known) == ("old:1",)
