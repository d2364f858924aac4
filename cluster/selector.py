"""Which replica computes one expert's rows of one batch.

An expert's whole batch goes to one replica: decode is bound by weight bandwidth, so splitting it makes two
hosts read the same weights. What is in flight, and who is healthy, the caller knows.
"""

from collections.abc import Container, Mapping

from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.ids import ExpertId, LayerId, ReplicaId


class NoReplica(LookupError):
    """Nobody healthy holds this expert in this layer, for now."""


def candidates(
    expert_map: ExpertMap,
    layer: LayerId,
    expert: ExpertId,
    inflight: Mapping[ReplicaId, int],
    healthy: Container[ReplicaId],
) -> list[ReplicaInfo]:
    """Healthy replicas of the expert, best first: fewest tokens in flight, then lowest id. May be empty.

    `inflight` has tokens sent and not answered; a replica that is not in it has none.
    """
    able = [r for r in expert_map.replicas_for(layer, expert) if r.replica_id in healthy]
    return sorted(able, key=lambda replica: (inflight.get(replica.replica_id, 0), replica.replica_id))


def select(
    expert_map: ExpertMap,
    layer: LayerId,
    expert: ExpertId,
    inflight: Mapping[ReplicaId, int],
    healthy: Container[ReplicaId],
) -> ReplicaId:
    """The best of `candidates`. Raises NoReplica when there is none."""
    ranked = candidates(expert_map, layer, expert, inflight, healthy)
    if not ranked:
        raise NoReplica(f"no healthy replica holds expert {expert} in layer {layer} (epoch {expert_map.epoch})")
    return ranked[0].replica_id
