"""Which replicas there should be at first, and what each needs: the configuration applied to a model.

What balancing makes of them is `desired_set`'s, where they go `placement`'s, what to do about the difference to what is
there `reconcile`'s decision.
"""

from dataclasses import dataclass

from cluster.config import ClusterConfig
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from cluster.replica_names import replica_name


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredReplica:
    """A replica that should exist: what it holds, what it needs of a node, and where it goes.

    `node_id` None leaves the place to the runtime. `cpu` is what is reserved, not what is used: on a machine
    with fewer cores than experts it must be 0, as the default is.
    """

    replica_id: ReplicaId
    expert_ids: tuple[ExpertId, ...]
    first_layer: LayerId
    num_layers: int
    gpu: float = 0.0
    cpu: float = 0.0
    memory_bytes: int = 0
    node_id: NodeId | None = None


def desired_replicas(
    config: ClusterConfig, *, num_layers: int, num_experts: int, experts_on_gpu: bool, memory_bytes: int = 0
) -> tuple[DesiredReplica, ...]:
    """`config.replicas` replicas of every group of `config.experts_per_actor` consecutive experts, all layers each.

    `memory_bytes` is the host memory of one replica. Raises ConfigError when the groups do not come out even.
    """
    config.check_experts(num_experts)
    default_gpu = 1.0 if experts_on_gpu else 0.0
    gpu = default_gpu if config.expert_num_gpus is None else config.expert_num_gpus
    return tuple(
        DesiredReplica(
            replica_id=replica_name(range(first, first + config.experts_per_actor), None, copy),
            expert_ids=tuple(ExpertId(expert) for expert in range(first, first + config.experts_per_actor)),
            first_layer=LayerId(0),
            num_layers=num_layers,
            gpu=gpu,
            memory_bytes=memory_bytes,
        )
        for first in range(0, num_experts, config.experts_per_actor)
        for copy in range(config.replicas)
    )
