"""The supervisor's two hands: one keeps the expert replicas, the other the coordinators.

Each looks at its processes, lets `cluster/` decide, and does what was decided. Neither is on the data plane.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from actors.coordinator.process import CoordinatorProcess
from actors.expert.process import ExpertProcess
from actors.supervision.blueprint import Blueprint, process_env
from actors.supervision.crew import Crew
from actors.supervision.fleet import Fleet
from actors.supervision.member import View
from actors.supervision.node_watch import NodeWatch
from cluster.desired import DesiredReplica
from cluster.desired_set import DesiredSet
from cluster.expert_map import ReplicaInfo
from cluster.handover import Acknowledged, acknowledged, needed_still
from cluster.ids import CoordinatorId, ExpertId, LayerId, NodeId, ReplicaId
from cluster.placement import (
    COORDINATOR_HOST,
    EXPERT_HOST,
    NodeSlots,
    PlacementError,
    place,
    place_coordinators,
    with_nodes,
)
from cluster.processes import Phase, ProcessView, Record, Start, keep
from cluster.quarantine import HealthReport, condemned, lost_by_peers, stand_ins, to_expel
from cluster.reconcile import Action, ObservedReplica, PublishMap, ReconcileState, StartReplica, StopReplica, reconcile
from cluster.redundancy import RedundancyState, count_copies, follow
from cluster.sources import sources_for

Say = Callable[[str], None]

HOPELESS_FAILURES = 2
"""So many failures in a row, and nobody waits for a process any more; it is tried again all the same."""

_PHASES = {
    "starting": Phase.STARTING,
    "loading": Phase.STARTING,
    "ready": Phase.READY,
    "draining": Phase.STOPPING,
    "failed": Phase.DEAD,
    "dead": Phase.DEAD,
}


@dataclass(slots=True)
class ExpertKeeper:
    """Expert replicas, and the map of those that are ready. `wanted` has the stand-ins, too.

    `desired` changes by `change` only. `former` are replicas that were desired and still have a process. Nobody new
    goes to a node in `shunned` or `leaving`. `looked` is set, and replaced by a new event, at the end of each round.
    """

    blueprint: Blueprint
    token: str
    fleet: Fleet
    say: Say
    state: ReconcileState
    views: Mapping[str, View] = field(default_factory=dict)
    wanted: tuple[DesiredReplica, ...] = ()
    unplaced: Mapping[ReplicaId, str] = field(default_factory=dict)
    redundancy: RedundancyState = field(default_factory=RedundancyState)
    acknowledged: Acknowledged = field(default_factory=lambda: Acknowledged(None, frozenset()))
    places: Mapping[ReplicaId, NodeId] = field(default_factory=dict)
    nodes: tuple[NodeSlots, ...] = ()
    shunned: frozenset[NodeId] = frozenset()
    leaving: frozenset[NodeId] = frozenset()
    looked: asyncio.Event = field(default_factory=asyncio.Event)
    desired: DesiredSet = field(init=False)
    former: dict[ReplicaId, DesiredReplica] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.desired = self.blueprint.desired()
        self.wanted = self.desired.replicas

    async def adopt(self) -> None:
        """Finds what an earlier supervisor started, and desires it."""
        await self.fleet.adopt()
        self.views = await self.fleet.observe()
        ending = ("draining", "failed", "dead")
        running = [ReplicaId(name) for name, view in self.views.items() if view.state not in ending]
        if running:
            self.desired = self.desired.rebuilt(running)
            self.wanted = self.desired.replicas

    def change(self, desired: DesiredSet) -> None:
        """From now on this is desired; the next round begins at once."""
        for one in self.desired.replicas:
            if one.replica_id not in desired.ids and one.replica_id in self.views:
                self.former[one.replica_id] = one
        for replica_id in desired.ids:
            self.former.pop(replica_id, None)
        stand_in = [one for one in self.wanted if one.replica_id not in self.desired.ids]
        self.desired = desired
        self.wanted = (*desired.replicas, *stand_in)
        self.fleet.changed.set()

    async def round(
        self, nodes: NodeWatch, reports: Collection[HealthReport], epochs: Mapping[str, int]
    ) -> dict[ReplicaId, NodeId]:
        """One look and what follows from it; returns where every replica is or will be.

        `reports` is what the coordinators said of the replicas last, `epochs` of which maps those have that serve.
        """
        self.views = await self.fleet.observe(away=lost_by_peers(reports), lost_nodes=nodes.lost)
        self._let_go(nodes)
        replicas = self.desired.replicas
        guilty = condemned(reports, self.state.joined)
        self.wanted = (*replicas, *stand_ins(replicas, guilty, self.state.expert_map))
        self.places = placement = self._place(nodes)
        self.acknowledged = acknowledged(epochs, reports, self.state.joined)
        actions, self.state = reconcile(
            with_nodes(self.wanted, placement),
            [_observed(view) for view in self.views.values()],
            time.monotonic(),
            self.state,
            unplaced=[one.replica_id for one in self.wanted] if nodes.head_silent else self.unplaced,
            condemned=to_expel(replicas, guilty, self.state.expert_map, self._hopeless()),
            acknowledged=self.acknowledged,
            min_copies=self.desired.min_copies,
        )
        for action in actions:
            await self._do(action, nodes)
        copies = count_copies(replicas, self.state.expert_map)
        events, self.redundancy = follow(self.redundancy, copies, time.monotonic())
        for event in events:
            self.say(event)
        looked, self.looked = self.looked, asyncio.Event()
        looked.set()
        return placement

    def _let_go(self, nodes: NodeWatch) -> None:
        """Forgets former replicas that are gone, and places on nodes that are."""
        living = _nodes_of(self.views)
        dead = {name for name, view in self.views.items() if view.dead is not None}
        self.former = {one: replica for one, replica in self.former.items() if one in self.views.keys() - dead}
        for name in dead - self.desired.ids - {one.replica_id for one in self.wanted}:
            self.fleet.forget(name)
        here = [node for node in nodes.slots if node.node_id not in nodes.lost]
        self.nodes = tuple(node for node in here if node.takes(EXPERT_HOST))
        if self.nodes and not nodes.head_silent:
            there = {node.node_id for node in self.nodes}
            away = [one for one in self.desired.replicas if one.replica_id not in living]
            homes = {one.node_id or self.places.get(one.replica_id) for one in away}
            gone = {node_id for node_id in homes if node_id is not None and node_id not in there}
            released = self.desired.released(gone, self.places)
            if set(released.replicas) != set(self.desired.replicas):
                self.change(released)

    def _place(self, nodes: NodeWatch) -> dict[ReplicaId, NodeId]:
        """Of those that are wanted; former ones take room while they last."""
        self.unplaced = {}
        current = {ReplicaId(name): node for name, node in _nodes_of(self.views).items()}
        former = [one for name, one in self.former.items() if name in current]
        shunned = nodes.lost | self.shunned | self.leaving
        try:
            return place((*self.wanted, *former), nodes.slots, current, shunned=shunned)
        except PlacementError as error:
            self.unplaced = error.unplaced
            if not nodes.head_silent:
                self.say(str(error))
            return error.placed

    def is_whole(self, replica_id: ReplicaId) -> bool:
        """True when the map has the replica with all that is desired of it."""
        wanted = next((one.num_layers for one in self.desired.replicas if one.replica_id == replica_id), None)
        in_map = {one.replica_id: one.num_layers for one in self.state.expert_map.replicas}
        return wanted is not None and in_map.get(replica_id) == wanted

    def is_spare(self, one: DesiredReplica) -> bool:
        """True for a replica without which the map has enough copies of what it holds."""
        others = (info for info in self.state.expert_map.replicas if info.replica_id != one.replica_id)
        leaver = {one.replica_id: _as_info(one)}
        current, min_copies = self.state.expert_map, self.desired.min_copies
        shape = (current.num_layers, current.num_experts)
        return not needed_still(leaver, others, self.desired.replicas, shape=shape, min_copies=min_copies)

    def _loading(self, one: DesiredReplica) -> dict[str, Any]:
        """How it loads: who is added to a cluster that serves, gently from those that do; who is missed, at once."""
        if not self.is_spare(one):
            return {}
        return {
            "sources": sources_for(one, self.state.expert_map),
            "load_bytes_per_s": self.blueprint.config.balance_bytes_per_s,
            "gentle": True,
        }

    def _hopeless(self) -> set[ReplicaId]:
        records = self.state.records
        return {*self.unplaced, *(ReplicaId(name) for name in records if records[name].failures >= HOPELESS_FAILURES)}

    def overtake(self, epoch: int) -> None:
        """Makes the map newer than `epoch`, which a coordinator has from a supervisor that is gone."""
        current = self.state.expert_map
        if epoch >= current.epoch:
            self.state = replace(self.state, expert_map=replace(current, epoch=epoch + 1))

    async def _do(self, action: Action, nodes: NodeWatch) -> None:
        config = self.blueprint.config
        match action:
            case StartReplica(replica, incarnation):
                _announce(self.say, self.state.records, replica.replica_id, incarnation)
                self.fleet.start(
                    replica.replica_id,
                    incarnation,
                    ExpertProcess,
                    self.blueprint.expert_kwargs(
                        replica, self.token, nodes.address(replica.node_id), **self._loading(replica)
                    ),
                    env=process_env(config.expert_threads),
                    node_id=replica.node_id,
                    num_gpus=replica.gpu,
                    role=nodes.role(replica.node_id, EXPERT_HOST),
                )
            case StopReplica(replica_id, incarnation, drain, reason):
                self.say(f"stopping {replica_id}: {reason}")
                self.fleet.stop_later(replica_id, incarnation, drain_s=config.drain_timeout_s if drain else 0.0)
            case PublishMap(expert_map):
                self.say(f"map epoch {expert_map.epoch}: {len(expert_map.replicas)} replicas")


@dataclass(slots=True)
class CoordinatorKeeper:
    """Coordinators: as many as configured, or as `crew` says; apart from each other and from experts where possible.

    Nobody new goes to a node in `leaving`.
    """

    blueprint: Blueprint
    token: str
    fleet: Fleet
    say: Say
    records: Mapping[str, Record] = field(default_factory=dict)
    views: Mapping[str, View] = field(default_factory=dict)
    leaving: frozenset[NodeId] = frozenset()
    crew: Crew = field(init=False)

    def __post_init__(self) -> None:
        self.crew = Crew(self.blueprint.config, self.say)

    async def round(self, nodes: NodeWatch, experts: Mapping[ReplicaId, NodeId]) -> None:
        """One look and what follows from it."""
        self.views = await self.fleet.observe(lost_nodes=nodes.lost)
        current = {CoordinatorId(name): node for name, node in _nodes_of(self.views).items()}
        wanted = self.crew.look(self.views.values(), time.monotonic())
        unfit = nodes.lost | self.leaving
        able = [one for one in nodes.slots if one.node_id not in unfit and one.takes(COORDINATOR_HOST)]
        places = place_coordinators(wanted, able, experts, current) if able else {}
        views = [
            ProcessView(view.process_id, view.incarnation, _PHASES[view.state], view.detail)
            for view in self.views.values()
        ]
        blocked = wanted if nodes.head_silent or not places else ()
        actions, self.records = keep(wanted, views, time.monotonic(), self.records, blocked=blocked)
        for action in actions:
            if isinstance(action, Start):
                coordinator_id = CoordinatorId(action.process_id)
                self._start(coordinator_id, action.incarnation, places[coordinator_id], nodes)
            else:
                self.say(f"stopping {action.process_id}: {action.reason}")
                drain_s = self.blueprint.config.drain_timeout_s if action.drain else 0.0
                self.fleet.stop_later(action.process_id, action.incarnation, drain_s=drain_s)

    def epochs(self) -> dict[str, int]:
        """The epoch of the map that each coordinator has, of those that serve."""
        return {
            name: int(view.info["map_epoch"])
            for name, view in self.views.items()
            if view.dead is None and view.info is not None and view.state in ("ready", "draining")
        }

    def reports(self) -> tuple[HealthReport, ...]:
        """What the living coordinators said of the replicas when they were last heard."""
        living = [view for view in self.views.values() if view.dead is None and view.info is not None]
        return tuple(report for view in living for report in _reports(view))

    def _start(self, coordinator_id: CoordinatorId, incarnation: int, node_id: NodeId, nodes: NodeWatch) -> None:
        _announce(self.say, self.records, coordinator_id, incarnation)
        cores = next((int(node.cpu) for node in nodes.slots if node.node_id == node_id), 1)
        threads = self.blueprint.config.coordinator_threads or max(1, cores)
        self.fleet.start(
            coordinator_id,
            incarnation,
            CoordinatorProcess,
            self.blueprint.coordinator_kwargs(coordinator_id, node_id, self.token, threads, nodes.address(node_id)),
            env=process_env(threads),
            node_id=node_id,
            num_gpus=self.blueprint.gpus_per_coordinator if self.blueprint.device == "cuda" else 0.0,
            role=nodes.role(node_id, COORDINATOR_HOST),
        )


def _reports(view: View) -> Iterable[HealthReport]:
    info = view.info or {}
    for one in info.get("replica_health", ()):
        yield HealthReport(
            coordinator_id=view.process_id,
            map_epoch=int(info["map_epoch"]),
            replica_id=ReplicaId(str(one["replica_id"])),
            state=str(one["state"]),
            detail=str(one.get("detail", "")),
        )


def _announce(say: Say, records: Mapping[str, Record], name: str, incarnation: int) -> None:
    if incarnation > 1:
        reason = records[name].detail if name in records else ""
        say(f"starting {name} again (incarnation {incarnation}): {reason or 'it was gone'}")


def _nodes_of(views: Mapping[str, View]) -> dict[str, NodeId]:
    """Where the living processes are, or will be."""
    return {
        name: NodeId(view.node_id) for name, view in views.items() if view.node_id is not None and view.dead is None
    }


def _as_info(one: DesiredReplica) -> ReplicaInfo:
    """The replica as if it were somewhere."""
    return ReplicaInfo(
        replica_id=one.replica_id,
        expert_ids=one.expert_ids,
        first_layer=one.first_layer,
        num_layers=one.num_layers,
        address="",
        node_id=NodeId(""),
        numerics_domain="",
    )


def _observed(view: View) -> ObservedReplica:
    phase = _PHASES[view.state]
    return ObservedReplica(
        replica_id=ReplicaId(view.process_id),
        incarnation=view.incarnation,
        phase=phase,
        info=_replica_info(view) if phase is Phase.READY or _grows(view) else None,
        detail=view.detail,
    )


def _grows(view: View) -> bool:
    """True while it loads and serves some layers already."""
    return view.state == "loading" and view.info is not None and bool(view.info.get("ready_layers"))


def _replica_info(view: View) -> ReplicaInfo:
    """What it holds; while it grows, the leading layers of all that it was asked for."""
    assert view.info is not None, view
    info, grows = view.info, _grows(view)
    return ReplicaInfo(
        replica_id=ReplicaId(info["replica_id"]),
        expert_ids=tuple(ExpertId(expert) for expert in info["asked_experts" if grows else "expert_ids"]),
        first_layer=LayerId(info["first_layer"]),
        num_layers=int(info["ready_layers" if grows else "num_layers"]),
        address=str(info["address"]),
        node_id=NodeId(str(info["node_id"])),
        numerics_domain=str(info["numerics_domain"]),
    )
