"""Whom a new replica asks for its weights before it reads a disk: those of the map that have them.

How weights travel, and what happens when somebody refuses, is not decided here.
"""

from cluster.desired import DesiredReplica
from cluster.expert_map import ExpertMap

MAX_SOURCES = 4


def sources_for(target: DesiredReplica, expert_map: ExpertMap, limit: int = MAX_SOURCES) -> tuple[str, ...]:
    """Addresses of replicas that hold some of what `target` will, at most `limit`: who has most of it comes first.

    Of equals, one on the target's own node, where nothing has to travel between machines; then by id. The replica
    itself is none of them: if it is in the map, that is its life before.
    """
    layers = range(target.first_layer, target.first_layer + target.num_layers)
    ranked = []
    for replica in expert_map.replicas:
        experts = len(set(replica.expert_ids) & set(target.expert_ids))
        shared = experts * len(range(max(layers.start, replica.layers.start), min(layers.stop, replica.layers.stop)))
        if shared and replica.replica_id != target.replica_id:
            away = target.node_id is None or replica.node_id != target.node_id
            ranked.append((-shared, away, replica.replica_id, replica.address))
    return tuple(address for *_, address in sorted(ranked)[:limit])
