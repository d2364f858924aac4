"""What to do about replicas that give wrong answers: who is condemned, and who stands in until another is there.

A coordinator that catches a replica asks it no more and says so in its report. The process is then replaced; where no
other process holds one of its experts, a stand-in is made ready before it goes. Pure values: stopping and starting
follow in `cluster.reconcile`.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from cluster.desired import DesiredReplica
from cluster.expert_map import ExpertMap
from cluster.ids import ReplicaId

QUARANTINED = "quarantined"
AWAY = "away"


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthReport:
    """What a coordinator says of one replica, as of its map of `map_epoch`."""

    coordinator_id: str
    map_epoch: int
    replica_id: ReplicaId
    state: str
    detail: str = ""


def condemned(reports: Iterable[HealthReport], joined: Mapping[ReplicaId, int]) -> dict[ReplicaId, str]:
    """Why each replica must go, for those that were caught.

    `joined` is the epoch since which the map has a replica as it is now. An older report is about its predecessor,
    who had the same id.
    """
    return {
        report.replica_id: f"{QUARANTINED} by {report.coordinator_id}: {report.detail or 'no reason given'}"
        for report in reports
        if report.state == QUARANTINED and report.map_epoch >= joined.get(report.replica_id, report.map_epoch + 1)
    }


def lost_by_peers(reports: Iterable[HealthReport]) -> frozenset[ReplicaId]:
    """Replicas to which some coordinator has no connection."""
    return frozenset(report.replica_id for report in reports if report.state == AWAY)


def stand_in_id(replica_id: ReplicaId) -> ReplicaId:
    """The id of whoever stands in for `replica_id`."""
    return ReplicaId(f"{replica_id}-stand-in")


def stand_ins(
    replicas: Iterable[DesiredReplica], guilty: Collection[ReplicaId], current: ExpertMap
) -> tuple[DesiredReplica, ...]:
    """The stand-ins that should exist beside `replicas`.

    One is wanted while a condemned replica is the last in the map for one of its experts, and kept until the
    replica's successor is in the map.
    """
    in_map = {replica.replica_id for replica in current.replicas}
    found = []
    for one in replicas:
        name = stand_in_id(one.replica_id)
        successor_is_there = one.replica_id in in_map and one.replica_id not in guilty
        if is_last(one, guilty, current) if name not in in_map else not successor_is_there:
            found.append(replace(one, replica_id=name, node_id=None))
    return tuple(found)


def is_last(one: DesiredReplica, guilty: Collection[ReplicaId], current: ExpertMap) -> bool:
    """True for a condemned replica in the map without which one of its experts would have only condemned ones."""
    if one.replica_id not in guilty or all(held.replica_id != one.replica_id for held in current.replicas):
        return False
    others = {
        held.replica_id: held
        for held in current.replicas
        if held.replica_id not in guilty
        and set(held.layers) >= set(range(one.first_layer, one.first_layer + one.num_layers))
    }
    return not all(any(expert in held.expert_ids for held in others.values()) for expert in one.expert_ids)


def to_expel(
    replicas: Iterable[DesiredReplica],
    guilty: Mapping[ReplicaId, str],
    current: ExpertMap,
    hopeless: Collection[ReplicaId],
) -> dict[ReplicaId, str]:
    """Who is stopped now, and why: all who are condemned but those whose stand-in is still on its way.

    `hopeless` are replicas that fit nowhere or failed again and again: nobody waits for such a stand-in.
    """
    return {
        one.replica_id: guilty[one.replica_id]
        for one in replicas
        if one.replica_id in guilty and (stand_in_id(one.replica_id) in hopeless or not is_last(one, guilty, current))
    }
