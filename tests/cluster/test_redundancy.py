"""Copies are counted by expert, and every change after the first wholeness is said once, with its duration."""

from cluster.desired import DesiredReplica
from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from cluster.redundancy import Copies, RedundancyState, count_copies, follow


def wanted(name: str, *experts: int, layers: range = range(2)) -> DesiredReplica:
    return DesiredReplica(
        replica_id=ReplicaId(name),
        expert_ids=tuple(map(ExpertId, experts)),
        first_layer=LayerId(layers.start),
        num_layers=len(layers),
    )


def held(replica: DesiredReplica) -> ReplicaInfo:
    return ReplicaInfo(
        replica_id=replica.replica_id,
        expert_ids=replica.expert_ids,
        first_layer=replica.first_layer,
        num_layers=replica.num_layers,
        address=f"host:{replica.replica_id}",
        node_id=NodeId("n0"),
        numerics_domain="fp16",
    )


def map_of(*replicas: DesiredReplica) -> ExpertMap:
    return ExpertMap(1, 2, 2, tuple(map(held, replicas)))


ALL = [wanted("a0", 0), wanted("a1", 0), wanted("b0", 1), wanted("b1", 1)]


def test_copies_are_those_of_the_layer_that_has_fewest() -> None:
    half = wanted("h", 0, layers=range(1))
    desired = [wanted("a0", 0), half, wanted("b", 1)]
    assert count_copies(desired, map_of(*desired)) == {0: Copies(1, 1), 1: Copies(1, 1)}
    assert count_copies(ALL, map_of(ALL[0], *ALL[2:])) == {0: Copies(1, 2), 1: Copies(2, 2)}
    assert count_copies(ALL, map_of()) == {0: Copies(0, 2), 1: Copies(0, 2)}


def test_a_start_is_no_loss() -> None:
    state = RedundancyState()
    for now_s, there in enumerate(([], ALL[:1], ALL[:3], ALL)):
        events, state = follow(state, count_copies(ALL, map_of(*there)), float(now_s))
        assert events == ()
    assert state.lacking_since_s == {}


def test_a_loss_and_its_end_are_said_once_each() -> None:
    _, state = follow(RedundancyState(), count_copies(ALL, map_of(*ALL)), 0.0)
    events, state = follow(state, count_copies(ALL, map_of(*ALL[1:])), 10.0)
    assert events == ("expert 0 has 1 of 2 copies",)
    events, state = follow(state, count_copies(ALL, map_of(*ALL[1:])), 12.0)
    assert events == ()
    events, state = follow(state, count_copies(ALL, map_of(*ALL[2:])), 13.0)
    assert events == ("expert 0 has 0 of 2 copies",)
    events, state = follow(state, count_copies(ALL, map_of(*ALL[1:])), 15.0)
    assert events == ("expert 0 has 1 of 2 copies",)
    events, state = follow(state, count_copies(ALL, map_of(*ALL)), 17.4)
    assert events == ("expert 0 has 2 of 2 copies again after 7.4 s",)
    events, state = follow(state, count_copies(ALL, map_of(*ALL)), 18.0)
    assert events == ()


def test_experts_lost_together_are_said_together() -> None:
    _, state = follow(RedundancyState(), count_copies(ALL, map_of(*ALL)), 0.0)
    events, state = follow(state, count_copies(ALL, map_of(ALL[0], ALL[2])), 1.0)
    assert events == ("experts 0, 1 have 1 of 2 copies",)
    events, _ = follow(state, count_copies(ALL, map_of(*ALL)), 3.0)
    assert events == ("experts 0, 1 have 2 of 2 copies again after 2.0 s",)


def test_one_copy_is_spelt_so() -> None:
    only = [wanted("a", 0), wanted("b", 1)]
    _, state = follow(RedundancyState(), count_copies(only, map_of(*only)), 0.0)
    events, _ = follow(state, count_copies(only, map_of(only[0])), 1.0)
    assert events == ("expert 1 has 0 of 1 copy",)


def test_a_copy_more_is_a_start_and_no_loss() -> None:
    _, state = follow(RedundancyState(), count_copies(ALL, map_of(*ALL)), 0.0)
    more = [*ALL, wanted("a2", 0)]
    events, state = follow(state, count_copies(more, map_of(*ALL)), 1.0)
    assert events == ()
    assert state.lacking_since_s == {}
    events, state = follow(state, count_copies(more, map_of(*more)), 2.0)
    assert events == ()
    events, _ = follow(state, count_copies(more, map_of(*ALL)), 3.0)
    assert events == ("expert 0 has 2 of 3 copies",)
