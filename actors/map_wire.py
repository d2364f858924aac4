"""The expert map as the wire says it. A published map's sizes are claims: they are bounded before anything is built."""

from cluster.expert_map import ExpertMap, ExpertMapError, ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from protos.coordinator_pb2 import PublishMapRequest, Replica
from protos.expert_pb2 import STATUS_INVALID, STATUS_STALE_EPOCH, Status

MAX_LAYERS = 4096
MAX_EXPERTS = 4096
MAX_PLACES = 1 << 20


class MapRefused(Exception):
    """A published map that is not taken, with the wire's status."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status = status


def map_from_wire(request: PublishMapRequest) -> ExpertMap:
    """The published map. Raises MapRefused when it contradicts itself or is larger than any model."""
    for name, limit in (("num_layers", MAX_LAYERS), ("num_experts", MAX_EXPERTS)):
        if not 1 <= getattr(request, name) <= limit:
            raise MapRefused(STATUS_INVALID, f"{name} is {getattr(request, name)}, but must be from 1 to {limit}")
    places = sum(one.num_layers * len(one.expert_ids) for one in request.replicas)
    if places > MAX_PLACES:
        raise MapRefused(STATUS_INVALID, f"replicas hold {places} pairs of layer and expert, but at most {MAX_PLACES}")
    try:
        return ExpertMap(
            request.map_epoch, request.num_layers, request.num_experts, tuple(map(_replica, request.replicas))
        )
    except ExpertMapError as error:
        raise MapRefused(STATUS_INVALID, str(error)) from None


def map_to_wire(expert_map: ExpertMap) -> PublishMapRequest:
    """The inverse of `map_from_wire`, for whoever publishes."""
    return PublishMapRequest(
        map_epoch=expert_map.epoch,
        num_layers=expert_map.num_layers,
        num_experts=expert_map.num_experts,
        replicas=[
            Replica(
                replica_id=one.replica_id,
                expert_ids=one.expert_ids,
                first_layer=one.first_layer,
                num_layers=one.num_layers,
                address=one.address,
                node_id=one.node_id,
                numerics_domain=one.numerics_domain,
            )
            for one in expert_map.replicas
        ],
    )


def refused(detail: str, new: ExpertMap, epoch_in_force: int) -> MapRefused:
    """What a map that the experts' side rejects is answered with: STALE_EPOCH where only its age is wrong."""
    status = STATUS_STALE_EPOCH if new.epoch <= epoch_in_force else STATUS_INVALID
    return MapRefused(status, detail)


def _replica(message: Replica) -> ReplicaInfo:
    return ReplicaInfo(
        replica_id=ReplicaId(message.replica_id),
        expert_ids=tuple(map(ExpertId, message.expert_ids)),
        first_layer=LayerId(message.first_layer),
        num_layers=message.num_layers,
        address=message.address,
        node_id=NodeId(message.node_id),
        numerics_domain=message.numerics_domain,
    )
