"""What to do so that the replicas that are become the replicas that should be.

One pure function, called as often as one likes: it looks at what is desired and observed, and returns actions
and the state for the next call. The life of the processes is `cluster.processes`; here they get experts, and
those that are ready a map. Doing the actions, and watching, is the supervisor's work.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from cluster.desired import DesiredReplica
from cluster.expert_map import ExpertMap, ReplicaInfo, agreeing
from cluster.ids import ReplicaId
from cluster.processes import Phase, ProcessPolicy, ProcessView, Record, Start, keep

__all__ = [
    "Action",
    "DesiredReplica",
    "ObservedReplica",
    "Phase",
    "PublishMap",
    "ReconcileState",
    "Record",
    "StartReplica",
    "StopReplica",
    "reconcile",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedReplica:
    """What the supervisor saw of a replica last. `incarnation` is that of the StartReplica that made it.

    `info` is there when it is READY; `detail` says why it is DEAD. A process that does not answer any more is
    DEAD.
    """

    replica_id: ReplicaId
    incarnation: int
    phase: Phase
    info: ReplicaInfo | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        assert self.phase is not Phase.ABSENT, f"{self.replica_id} is observed to be absent"
        assert (self.info is not None) == (self.phase is Phase.READY), (
            self.replica_id,
            self.phase,
            self.info,
        )


@dataclass(frozen=True, slots=True)
class StartReplica:
    """Start a process for `replica`, on its node. There is none, as far as anybody knows."""

    replica: DesiredReplica
    incarnation: int


@dataclass(frozen=True, slots=True)
class StopReplica:
    """End a process; with `drain`, let it answer what it has first. If there is none, there is nothing to do."""

    replica_id: ReplicaId
    incarnation: int
    drain: bool
    reason: str


@dataclass(frozen=True, slots=True)
class PublishMap:
    """Give every coordinator this map. One that lags later, as after a restart, is given the state's map."""

    expert_map: ExpertMap


Action = PublishMap | StopReplica | StartReplica


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcileState:
    """Carried from one call to the next. `expert_map` is the newest map.

    `refused` has a reason for each replica that is ready and yet not in the map.
    """

    expert_map: ExpertMap
    records: Mapping[str, Record] = field(default_factory=dict)
    refused: Mapping[ReplicaId, str] = field(default_factory=dict)

    @classmethod
    def initial(cls, num_layers: int, num_experts: int, epoch: int = 0) -> "ReconcileState":
        """An empty map. A new supervisor of an old cluster gives the newest `epoch` that it can find."""
        return cls(expert_map=ExpertMap(epoch, num_layers, num_experts, ()))


def reconcile(
    desired: Iterable[DesiredReplica],
    observed: Iterable[ObservedReplica],
    now_s: float,
    state: ReconcileState,
    *,
    unplaced: Collection[ReplicaId] = (),
    policy: ProcessPolicy | None = None,
) -> tuple[tuple[Action, ...], ReconcileState]:
    """Actions to take in order, and the next state. Without news there are no actions.

    `observed` has every process that is not known to be gone. It may be late, by less than the policy's
    timeouts, but who was in it and is no more is taken for dead. Replicas in `unplaced` are not started
    now. A replica that is observed but not desired is taken from the map, then drained and stopped.
    """
    wanted = {replica.replica_id: replica for replica in desired}
    seen = {replica.replica_id: replica for replica in observed}
    views = [ProcessView(one.replica_id, one.incarnation, one.phase, one.detail) for one in seen.values()]
    steps, records = keep(wanted, views, now_s, state.records, blocked=unplaced, policy=policy)
    processes: list[Action] = [
        StartReplica(wanted[ReplicaId(step.process_id)], step.incarnation)
        if isinstance(step, Start)
        else StopReplica(ReplicaId(step.process_id), step.incarnation, step.drain, step.reason)
        for step in steps
    ]
    ready = {
        replica_id: view.info
        for replica_id, view in seen.items()
        if view.info is not None and replica_id in wanted and _is_current(view, records[replica_id])
    }
    expert_map, refused = _next_map(state.expert_map, ready, wanted, records)
    published: list[Action] = [] if expert_map is state.expert_map else [PublishMap(expert_map)]
    after = ReconcileState(expert_map=expert_map, records=records, refused=refused)
    return (*published, *processes), after


def _is_current(view: ObservedReplica, record: Record) -> bool:
    return record.phase is Phase.READY and record.incarnation == view.incarnation


def _next_map(
    current: ExpertMap,
    ready: Mapping[ReplicaId, ReplicaInfo],
    wanted: Mapping[ReplicaId, DesiredReplica],
    records: Mapping[str, Record],
) -> tuple[ExpertMap, dict[ReplicaId, str]]:
    """The map of what is ready, and who is kept out. An address is that of who became ready there last."""
    refused: dict[ReplicaId, str] = {}
    by_address: dict[str, ReplicaInfo] = {}
    for replica_id in sorted(ready, key=lambda r: (-records[r].since_s, r)):
        info, target = ready[replica_id], wanted[replica_id]
        held = (info.replica_id, info.expert_ids, info.first_layer, info.num_layers)
        if held != (replica_id, target.expert_ids, target.first_layer, target.num_layers):
            refused[replica_id] = f"holds {held}, which is not what was asked for"
        elif not info.address or info.address in by_address:
            refused[replica_id] = f"its address {info.address!r} is empty or another replica's"
        else:
            by_address[info.address] = info
    kept, strangers = agreeing(by_address.values(), current.replicas)
    for replica in strangers:
        refused[replica.replica_id] = f"computes in another numerics domain, {replica.numerics_domain!r}"
    if set(kept) == set(current.replicas):
        return current, refused
    return current.with_replicas(kept), refused
