"""What to do so that the replicas that are become the replicas that should be.

One pure function, called as often as one likes: it looks at what is desired and observed, and returns actions
and the state for the next call. It believes nothing that it has not seen: a start that never shows is given
up after a while and tried again, after a pause that doubles up to a cap. Doing the actions, and watching, is
the supervisor's work.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from cluster.desired import DesiredReplica
from cluster.expert_map import ExpertMap, ReplicaInfo, agreeing
from cluster.ids import ReplicaId

__all__ = [
    "Action",
    "DesiredReplica",
    "ObservedReplica",
    "Phase",
    "PublishMap",
    "ReconcilePolicy",
    "ReconcileState",
    "Record",
    "StartReplica",
    "StopReplica",
    "reconcile",
]


class Phase(Enum):
    """The life of one process, as seen or as believed."""

    ABSENT = "absent"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    DEAD = "dead"


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
    """End a process; with `drain`, let it answer what it has first. It may not exist: then there is nothing
    to do.
    """

    replica_id: ReplicaId
    incarnation: int
    drain: bool
    reason: str


@dataclass(frozen=True, slots=True)
class PublishMap:
    """Give every coordinator this map. One that lags behind later, as after a restart, is given the state's
    map.
    """

    expert_map: ExpertMap


Action = PublishMap | StopReplica | StartReplica


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcilePolicy:
    """Times of the decisions, in seconds.

    A first failure is followed by a start at once, the n-th in a row (n > 1) by a pause of base · 2^(n -
    2), up to the cap.
    """

    backoff_base_s: float = 0.5
    backoff_cap_s: float = 30.0
    stable_s: float = 60.0
    """Ready for so long, a replica's earlier failures are forgotten."""
    start_timeout_s: float = 900.0
    stop_timeout_s: float = 60.0

    def backoff_s(self, failures: int) -> float:
        """Pause before the next start; 0 after the first failure."""
        if failures < 2:
            return 0.0
        return min(self.backoff_cap_s, self.backoff_base_s * math.ldexp(1.0, min(failures - 2, 64)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is believed of one replica id: its phase since when, failures in a row, when it may be started.

    `seen` is True once this incarnation has been observed alive.
    """

    incarnation: int = 0
    seen: bool = False
    phase: Phase = Phase.ABSENT
    since_s: float = -math.inf
    failures: int = 0
    retry_at_s: float = -math.inf
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcileState:
    """Carried from one call to the next. `expert_map` is the newest map.

    `refused` has a reason for each replica that is ready and yet not in the map.
    """

    expert_map: ExpertMap
    records: Mapping[ReplicaId, Record] = field(default_factory=dict)
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
    policy: ReconcilePolicy | None = None,
) -> tuple[tuple[Action, ...], ReconcileState]:
    """Actions to take in order, and the next state. Without news there are no actions.

    `observed` has every process that is not known to be gone. It may be late, by less than the policy's
    timeouts, but who was in it and is no more is taken for dead. Replicas in `unplaced` are not started
    now. A replica that is observed but not desired is taken from the map, then drained and stopped.
    """
    rules = ReconcilePolicy() if policy is None else policy
    wanted = {replica.replica_id: replica for replica in desired}
    seen = {replica.replica_id: replica for replica in observed}
    records: dict[ReplicaId, Record] = {}
    processes: list[Action] = []
    for replica_id in sorted({*wanted, *seen, *state.records}):
        before = state.records.get(replica_id, Record())
        record = _believe(before, seen.get(replica_id), now_s, rules)
        target = wanted.get(replica_id)
        blocked = replica_id in unplaced
        record, action = _act(record, replica_id, target, now_s, rules, blocked=blocked)
        if action is not None:
            processes.append(action)
        if target is not None or replica_id in seen or record.phase is not Phase.ABSENT:
            records[replica_id] = record
    ready = {
        replica_id: view.info
        for replica_id, view in seen.items()
        if view.info is not None and replica_id in wanted and records[replica_id].phase is Phase.READY
    }
    expert_map, refused = _next_map(state.expert_map, ready, wanted, records)
    published: list[Action] = [] if expert_map is state.expert_map else [PublishMap(expert_map)]
    after = ReconcileState(expert_map=expert_map, records=records, refused=refused)
    return (*published, *processes), after


def _next_map(
    current: ExpertMap,
    ready: Mapping[ReplicaId, ReplicaInfo],
    wanted: Mapping[ReplicaId, DesiredReplica],
    records: Mapping[ReplicaId, Record],
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


def _believe(record: Record, view: ObservedReplica | None, now_s: float, rules: ReconcilePolicy) -> Record:
    """Take in what is seen. An older incarnation than the last one started says nothing about the new one."""
    if view is not None and view.incarnation < record.incarnation:
        view = None
    if view is None:
        return _without_process(record, now_s, rules, certain=record.seen)
    record = replace(record, incarnation=view.incarnation)
    if view.phase is Phase.DEAD:
        return _without_process(replace(record, detail=view.detail), now_s, rules, certain=True)
    record = replace(record, seen=True)
    if record.phase is Phase.STOPPING:
        return record
    if view.phase is not record.phase:
        record = replace(record, phase=view.phase, since_s=now_s)
    if record.phase is Phase.READY and now_s - record.since_s >= rules.stable_s:
        record = replace(record, failures=0, detail="")
    return record


def _without_process(record: Record, now_s: float, rules: ReconcilePolicy, *, certain: bool) -> Record:
    """Nothing alive is seen. Unless it is `certain` to be gone, a process may still be about to show."""
    if record.phase is Phase.ABSENT or (record.phase is Phase.STARTING and not certain):
        return record
    absent = replace(record, phase=Phase.ABSENT, since_s=now_s)
    if record.phase is Phase.STOPPING:
        return absent if certain or now_s - record.since_s >= rules.stop_timeout_s else record
    return _failed(absent, now_s, rules)


def _failed(record: Record, now_s: float, rules: ReconcilePolicy) -> Record:
    failures = record.failures + 1
    return replace(record, failures=failures, retry_at_s=now_s + rules.backoff_s(failures))


def _act(
    record: Record,
    replica_id: ReplicaId,
    target: DesiredReplica | None,
    now_s: float,
    rules: ReconcilePolicy,
    *,
    blocked: bool,
) -> tuple[Record, Action | None]:
    """At most one action for one replica id: from what is believed to what is wanted."""
    age_s = now_s - record.since_s
    if record.phase is Phase.ABSENT:
        if target is None or blocked or now_s < record.retry_at_s:
            return record, None
        next_one = record.incarnation + 1
        record = replace(record, incarnation=next_one, seen=False, phase=Phase.STARTING, since_s=now_s)
        return record, StartReplica(target, next_one)
    stop: tuple[bool, str] | None = None
    if record.phase is Phase.STOPPING:
        if age_s >= rules.stop_timeout_s:
            stop = False, f"still there after {age_s:.0f} s of stopping"
    elif target is None:
        stop = record.phase is Phase.READY, "not wanted any more"
    elif record.phase is Phase.STARTING and age_s >= rules.start_timeout_s:
        record = replace(_failed(record, now_s, rules), detail=f"not ready after {age_s:.0f} s")
        stop = False, record.detail
    if stop is None:
        return record, None
    drain, reason = stop
    record = replace(record, phase=Phase.STOPPING, since_s=now_s)
    return record, StopReplica(replica_id, record.incarnation, drain, reason)
