"""An expert's batch goes to the healthy replica with the least in flight."""

import pytest

from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from cluster.selector import NoReplica, candidates, select

LAYER, EXPERT = LayerId(0), ExpertId(0)
A, B, C = ReplicaId("a"), ReplicaId("b"), ReplicaId("c")


def replica(replica_id: ReplicaId, expert: int = 0) -> ReplicaInfo:
    return ReplicaInfo(
        replica_id=replica_id,
        expert_ids=(ExpertId(expert),),
        first_layer=LayerId(0),
        num_layers=1,
        address=f"host:{replica_id}",
        node_id=NodeId("n0"),
        numerics_domain="fp16",
    )


MAP = ExpertMap(3, 1, 2, (replica(C), replica(A), replica(B), replica(ReplicaId("other"), 1)))


@pytest.mark.parametrize(
    ("inflight", "order"),
    [
        ({}, [A, B, C]),
        ({A: 1}, [B, C, A]),
        ({A: 5, B: 7, C: 5}, [A, C, B]),
        ({B: 0, ReplicaId("other"): 9}, [A, B, C]),
    ],
)
def test_least_in_flight_first_then_lowest_id(inflight: dict[ReplicaId, int], order: list[ReplicaId]) -> None:
    healthy = {A, B, C, ReplicaId("other")}
    assert [r.replica_id for r in candidates(MAP, LAYER, EXPERT, inflight, healthy)] == order
    assert select(MAP, LAYER, EXPERT, inflight, healthy) == order[0]


def test_the_unhealthy_are_left_out() -> None:
    assert select(MAP, LAYER, EXPERT, {C: 100}, {C}) == C


def test_with_nobody_left_it_says_so() -> None:
    assert candidates(MAP, LAYER, EXPERT, {}, set()) == []
    with pytest.raises(NoReplica, match=r"no healthy replica holds expert 0 in layer 0 \(epoch 3\)"):
        select(MAP, LAYER, EXPERT, {}, {ReplicaId("other")})
    with pytest.raises(NoReplica):
        select(MAP, LayerId(1), EXPERT, {}, {A, B, C})
