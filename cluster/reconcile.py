"""What to do so that the replicas that are become the replicas that should be.

One pure function, called as often as one likes: it looks at what is desired and observed, and returns actions
and the state for the next call. The life of the processes is `cluster.processes`; here they get experts, and
those that are ready a map. Doing the actions, and watching, is the supervisor's work.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from cluster.desired import DesiredReplica
from cluster.expert_map import ExpertMap, ReplicaInfo, agreeing
from cluster.handover import Acknowledged, needed_still
from cluster.ids import ExpertId, ReplicaId
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

LEAVE_TIMEOUT_S = 10.0
"""So long a replica that has left the map answers those who have not heard of it; then it drains."""

GROWTH_STEPS = 4
"""In so many steps at most a copy that still loads comes into the map: each is a map of its own."""

GROWS_AFTER_S = 10.0
"""A copy that is whole sooner is not asked before: its loading stands behind others, and would hold up the rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedReplica:
    """What the supervisor saw of a replica last. `incarnation` is that of the StartReplica that made it.

    `info` is there when it is READY, and has what it holds; while it is STARTING it may be there, too, and has the
    leading layers that are loaded already and may be asked. `detail` says why it is DEAD. A process that does not
    answer any more is DEAD.
    """

    replica_id: ReplicaId
    incarnation: int
    phase: Phase
    info: ReplicaInfo | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        assert self.phase is not Phase.ABSENT, f"{self.replica_id} is observed to be absent"
        assert self.info is not None or self.phase is not Phase.READY, (self.replica_id, self.phase)
        assert self.info is None or self.phase in (Phase.STARTING, Phase.READY), (self.replica_id, self.phase)


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

    `refused` has a reason for each replica that is ready and yet not in the map, `joined` the epoch since which the
    map has a replica as it is now, `left` the epoch without those that are to end, and when it was made.
    """

    expert_map: ExpertMap
    records: Mapping[str, Record] = field(default_factory=dict)
    refused: Mapping[ReplicaId, str] = field(default_factory=dict)
    joined: Mapping[ReplicaId, int] = field(default_factory=dict)
    left: Mapping[ReplicaId, tuple[int, float]] = field(default_factory=dict)

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
    condemned: Mapping[ReplicaId, str] | None = None,
    policy: ProcessPolicy | None = None,
    acknowledged: Acknowledged | None = None,
    min_copies: int = 1,
) -> tuple[tuple[Action, ...], ReconcileState]:
    """Actions to take in order, and the next state. Without news there are no actions.

    `observed` has every process that is not known to be gone. It may be late, by less than the policy's
    timeouts, but who was in it and is no more is taken for dead. Replicas in `unplaced` are not started
    now. One that is `condemned`, for the reason given, is taken from the map, stopped without draining, and started
    again.

    A replica that is observed but not desired serves on until `min_copies` others (or all that are desired, if fewer)
    hold what it holds, are in the map and, as far as the coordinators have `acknowledged`, can be asked by each of
    them. Then it leaves the map, and when no coordinator uses an older one it is drained and stopped.

    A copy that loads for long is in the map with the layers that it has, as long as others serve its experts, too.
    """
    wanted = {replica.replica_id: replica for replica in desired}
    seen = {replica.replica_id: replica for replica in observed}
    current = state.expert_map
    leavers = {one.replica_id: one.info for one in seen.values() if one.info and one.replica_id not in wanted}
    stay = needed_still(
        leavers,
        _cover(current, seen, wanted, acknowledged),
        wanted.values(),
        shape=(current.num_layers, current.num_experts),
        min_copies=min_copies,
    )
    linger = _lingering(state, leavers.keys() - stay, now_s, acknowledged)
    views = [ProcessView(one.replica_id, one.incarnation, one.phase, one.detail) for one in seen.values()]
    steps, records = keep(
        {*wanted, *stay, *linger},
        views,
        now_s,
        state.records,
        blocked=unplaced,
        condemned=_by_name(condemned),
        policy=policy,
    )
    processes: list[Action] = [
        StartReplica(wanted[ReplicaId(step.process_id)], step.incarnation)
        if isinstance(step, Start)
        else StopReplica(ReplicaId(step.process_id), step.incarnation, step.drain, step.reason)
        for step in steps
    ]
    current_ones = {
        replica_id: view
        for replica_id, view in seen.items()
        if (replica_id in wanted or replica_id in stay) and _is_current(view, records[replica_id])
    }
    ready = {one: view.info for one, view in current_ones.items() if view.info and view.phase is Phase.READY}
    growing = {
        one: view.info
        for one, view in current_ones.items()
        if view.info and view.phase is Phase.STARTING and now_s - records[one].since_s >= GROWS_AFTER_S
    }
    expert_map, refused = _next_map(current, ready, _grown(growing, ready, wanted, current), wanted, records)
    published: list[Action] = [] if expert_map is current else [PublishMap(expert_map)]
    after = ReconcileState(
        expert_map=expert_map,
        records=records,
        refused=refused,
        joined=_joined(state, expert_map),
        left={one: state.left.get(one, (expert_map.epoch, now_s)) for one in linger},
    )
    return (*published, *processes), after


def _cover(
    current: ExpertMap,
    seen: Mapping[ReplicaId, ObservedReplica],
    wanted: Collection[ReplicaId],
    acknowledged: Acknowledged | None,
) -> list[ReplicaInfo]:
    """Replicas that serve and are to stay: in the map as they are now, and known to the coordinators."""
    return [
        info
        for info in current.replicas
        if info.replica_id in wanted
        and info.replica_id in seen
        and seen[info.replica_id].info == info
        and (acknowledged is None or acknowledged.can_ask(info.replica_id))
    ]


def _lingering(
    state: ReconcileState, leavers: Collection[ReplicaId], now_s: float, acknowledged: Acknowledged | None
) -> set[ReplicaId]:
    """Those that leave the map now or have left it, and are still named in the map of some coordinator."""
    if acknowledged is None:
        return set()
    in_map = {one.replica_id for one in state.expert_map.replicas}
    waiting = set()
    for replica_id in leavers:
        epoch, since_s = state.left.get(replica_id, (state.expert_map.epoch + 1, now_s))
        leaves = replica_id in in_map or replica_id in state.left
        if leaves and not acknowledged.has(epoch) and now_s - since_s < LEAVE_TIMEOUT_S:
            waiting.add(replica_id)
    return waiting


def _by_name(reasons: Mapping[ReplicaId, str] | None) -> dict[str, str]:
    return {} if reasons is None else {str(name): reason for name, reason in reasons.items()}


def _joined(before: ReconcileState, current: ExpertMap) -> dict[ReplicaId, int]:
    known = {one.replica_id: one for one in before.expert_map.replicas}
    return {
        one.replica_id: before.joined.get(one.replica_id, current.epoch)
        if known.get(one.replica_id) == one
        else current.epoch
        for one in current.replicas
    }


def _is_current(view: ObservedReplica, record: Record) -> bool:
    return record.phase is view.phase and record.incarnation == view.incarnation


def _grown(
    growing: Mapping[ReplicaId, ReplicaInfo],
    ready: Mapping[ReplicaId, ReplicaInfo],
    wanted: Mapping[ReplicaId, DesiredReplica],
    current: ExpertMap,
) -> dict[ReplicaId, ReplicaInfo]:
    """Replicas that still load, as far as they may be asked: copies that compute as those that are whole do.

    Kernels can differ from layer to layer. So who holds a part may have to wait until it is whole; and where nobody is
    whole, as at the start, part of a column is of no use.
    """
    domains: dict[ExpertId, str] = {}
    for info in sorted(ready.values(), key=lambda one: one in current.replicas):  # who serves now has the last word
        domains.update(dict.fromkeys(info.expert_ids, info.numerics_domain))
    found = {}
    for replica_id, info in growing.items():
        target = wanted.get(replica_id)
        if target is None or (info.expert_ids, info.first_layer) != (target.expert_ids, target.first_layer):
            continue
        step = -(-target.num_layers // GROWTH_STEPS)
        held = min(info.num_layers, target.num_layers - 1)  # it is whole when it says that it is ready
        num_layers = held - held % step
        if num_layers and all(domains.get(expert) == info.numerics_domain for expert in info.expert_ids):
            found[replica_id] = replace(info, num_layers=num_layers)
    return found


def _next_map(
    current: ExpertMap,
    ready: Mapping[ReplicaId, ReplicaInfo],
    growing: Mapping[ReplicaId, ReplicaInfo],
    wanted: Mapping[ReplicaId, DesiredReplica],
    records: Mapping[str, Record],
) -> tuple[ExpertMap, dict[ReplicaId, str]]:
    """The map of what is ready or grows, and who is kept out. An address is that of who became ready there last."""
    refused: dict[ReplicaId, str] = {}
    by_address: dict[str, ReplicaInfo] = {}
    for replica_id in sorted(ready, key=lambda r: (-records[r].since_s, r)):
        info, target = ready[replica_id], wanted.get(replica_id)
        held = (info.replica_id, info.expert_ids, info.first_layer, info.num_layers)
        if target and held != (replica_id, target.expert_ids, target.first_layer, target.num_layers):
            refused[replica_id] = f"holds {held}, which is not what was asked for"
        elif not info.address or info.address in by_address:
            refused[replica_id] = f"its address {info.address!r} is empty or another replica's"
        else:
            by_address[info.address] = info
    for info in growing.values():
        by_address.setdefault(info.address, info)
    kept, strangers = agreeing(by_address.values(), current.replicas)
    for replica in strangers:
        refused[replica.replica_id] = f"computes in another numerics domain, {replica.numerics_domain!r}"
    if set(kept) == set(current.replicas):
        return current, refused
    return current.with_replicas(kept), refused
