"""When a replica that is not wanted any more may go: everything that it holds is served by others, and they are known.

A coordinator knows a replica when it has a map with it and a connection to it. Taking replicas from the map and ending
processes follows in `cluster.reconcile`. L layers, E experts.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from cluster.desired import DesiredReplica
from cluster.desired_set import count_places
from cluster.expert_map import ReplicaInfo
from cluster.ids import ReplicaId
from cluster.layout import IntArray
from cluster.quarantine import AWAY, QUARANTINED, HealthReport


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """What the coordinators that serve have taken in: the oldest map among theirs, and whom all of them can ask.

    Without coordinators nobody waits for anything: `epoch` is None.
    """

    epoch: int | None
    known: frozenset[ReplicaId]

    def has(self, epoch: int) -> bool:
        """True when nobody uses an older map than this."""
        return self.epoch is None or self.epoch >= epoch

    def can_ask(self, replica_id: ReplicaId) -> bool:
        """True when every coordinator can."""
        return self.epoch is None or replica_id in self.known


def acknowledged(
    epochs: Mapping[str, int], reports: Iterable[HealthReport], joined: Mapping[ReplicaId, int]
) -> Acknowledged:
    """From the epoch of each serving coordinator and what they report.

    `joined` is the epoch since which the map has a replica as it is now: an older report is about another process.
    """
    asked: dict[ReplicaId, set[str]] = {}
    for report in reports:
        fresh = report.map_epoch >= joined.get(report.replica_id, report.map_epoch + 1)
        if fresh and report.state not in (AWAY, QUARANTINED):
            asked.setdefault(report.replica_id, set()).add(report.coordinator_id)
    known = frozenset(replica_id for replica_id, by in asked.items() if by >= epochs.keys())
    return Acknowledged(min(epochs.values(), default=None), known)


def needed_still(
    leavers: Mapping[ReplicaId, ReplicaInfo],
    cover: Iterable[ReplicaInfo],
    wanted: Collection[DesiredReplica],
    *,
    shape: tuple[int, int],
    min_copies: int,
) -> frozenset[ReplicaId]:
    """Those of the leavers without which some expert of some layer would have too few in `cover`, or nobody.

    Enough are `min_copies`, or as many as are wanted there if that is less. `shape` is (L, E).
    """
    if not leavers:
        return frozenset()
    served_LE: IntArray = np.zeros(shape, np.int64)
    for info in cover:
        served_LE[info.first_layer : info.first_layer + info.num_layers, list(info.expert_ids)] += 1
    enough_LE = np.clip(count_places(wanted, *shape), 1, min_copies)
    lacks_LE = served_LE < enough_LE
    return frozenset(
        replica_id
        for replica_id, info in leavers.items()
        if lacks_LE[info.first_layer : info.first_layer + info.num_layers, list(info.expert_ids)].any()
    )
