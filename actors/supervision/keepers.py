"""The supervisor's two hands: one keeps the expert replicas, the other the coordinators.

Each looks at its processes, lets `cluster/` decide, and does what was decided. Neither is on the data plane.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from actors.coordinator.actor import Coordinator
from actors.expert.actor import ExpertActor
from actors.supervision.blueprint import Blueprint, process_env
from actors.supervision.fleet import Fleet, View
from cluster.expert_map import ReplicaInfo
from cluster.ids import CoordinatorId, ExpertId, LayerId, NodeId, ReplicaId
from cluster.placement import NodeSlots, PlacementError, place, place_coordinators, with_nodes
from cluster.processes import Phase, ProcessView, Record, Start, keep
from cluster.reconcile import Action, ObservedReplica, PublishMap, ReconcileState, StartReplica, StopReplica, reconcile

Say = Callable[[str], None]

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
    """Expert replicas, and the map of those that are ready."""

    blueprint: Blueprint
    token: str
    fleet: Fleet
    say: Say
    state: ReconcileState
    views: Mapping[str, View] = field(default_factory=dict)
    unplaced: Mapping[ReplicaId, str] = field(default_factory=dict)

    async def round(self, nodes: tuple[NodeSlots, ...]) -> dict[ReplicaId, NodeId]:
        """One look and what follows from it; returns where every replica is or will be."""
        self.views = await self.fleet.observe()
        replicas = self.blueprint.replicas()
        self.unplaced = {}
        try:
            placement = place(replicas, nodes, {ReplicaId(name): node for name, node in _nodes_of(self.views).items()})
        except PlacementError as error:
            placement, self.unplaced = error.placed, error.unplaced
            self.say(str(error))
        observed = [_observed(view) for view in self.views.values()]
        actions, self.state = reconcile(
            with_nodes(replicas, placement), observed, time.monotonic(), self.state, unplaced=self.unplaced
        )
        for action in actions:
            await self._do(action)
        return placement

    def overtake(self, epoch: int) -> None:
        """Makes the map newer than `epoch`, which a coordinator has from a supervisor that is gone."""
        current = self.state.expert_map
        if epoch >= current.epoch:
            self.state = replace(self.state, expert_map=replace(current, epoch=epoch + 1))

    async def _do(self, action: Action) -> None:
        config = self.blueprint.config
        match action:
            case StartReplica(replica, incarnation):
                _announce(self.say, self.state.records, replica.replica_id, incarnation)
                self.fleet.start(
                    replica.replica_id,
                    incarnation,
                    ExpertActor,
                    self.blueprint.expert_kwargs(replica, self.token),
                    env=process_env(config.expert_threads),
                    node_id=replica.node_id,
                    num_gpus=replica.gpu,
                )
            case StopReplica(replica_id, incarnation, drain, reason):
                self.say(f"stopping {replica_id}: {reason}")
                self.fleet.stop_later(replica_id, incarnation, drain_s=config.drain_timeout_s if drain else 0.0)
            case PublishMap(expert_map):
                self.say(f"map epoch {expert_map.epoch}: {len(expert_map.replicas)} replicas")


@dataclass(slots=True)
class CoordinatorKeeper:
    """Coordinators: as many as configured, apart from each other and from the experts where there is room."""

    blueprint: Blueprint
    token: str
    fleet: Fleet
    say: Say
    records: Mapping[str, Record] = field(default_factory=dict)
    views: Mapping[str, View] = field(default_factory=dict)

    async def round(self, nodes: tuple[NodeSlots, ...], experts: Mapping[ReplicaId, NodeId]) -> None:
        """One look and what follows from it."""
        self.views = await self.fleet.observe()
        current = {CoordinatorId(name): node for name, node in _nodes_of(self.views).items()}
        places = place_coordinators(self.blueprint.coordinator_ids, nodes, experts, current)
        views = [
            ProcessView(view.process_id, view.incarnation, _PHASES[view.state], view.detail)
            for view in self.views.values()
        ]
        actions, self.records = keep(self.blueprint.coordinator_ids, views, time.monotonic(), self.records)
        for action in actions:
            if isinstance(action, Start):
                coordinator_id = CoordinatorId(action.process_id)
                self._start(coordinator_id, action.incarnation, places[coordinator_id], nodes)
            else:
                self.say(f"stopping {action.process_id}: {action.reason}")
                drain_s = self.blueprint.config.drain_timeout_s if action.drain else 0.0
                self.fleet.stop_later(action.process_id, action.incarnation, drain_s=drain_s)

    def _start(
        self, coordinator_id: CoordinatorId, incarnation: int, node_id: NodeId, nodes: tuple[NodeSlots, ...]
    ) -> None:
        _announce(self.say, self.records, coordinator_id, incarnation)
        cores = next((int(node.cpu) for node in nodes if node.node_id == node_id), 1)
        threads = self.blueprint.config.coordinator_threads or max(1, cores)
        self.fleet.start(
            coordinator_id,
            incarnation,
            Coordinator,
            self.blueprint.coordinator_kwargs(coordinator_id, node_id, self.token, threads),
            env=process_env(threads),
            node_id=node_id,
            num_gpus=self.blueprint.gpus_per_coordinator if self.blueprint.device == "cuda" else 0.0,
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


def _observed(view: View) -> ObservedReplica:
    phase = _PHASES[view.state]
    return ObservedReplica(
        replica_id=ReplicaId(view.process_id),
        incarnation=view.incarnation,
        phase=phase,
        info=_replica_info(view) if phase is Phase.READY else None,
        detail=view.detail,
    )


def _replica_info(view: View) -> ReplicaInfo:
    assert view.info is not None, view
    info = view.info
    return ReplicaInfo(
        replica_id=ReplicaId(info["replica_id"]),
        expert_ids=tuple(ExpertId(expert) for expert in info["expert_ids"]),
        first_layer=LayerId(info["first_layer"]),
        num_layers=int(info["num_layers"]),
        address=str(info["address"]),
        node_id=NodeId(str(info["node_id"])),
        numerics_domain=str(info["numerics_domain"]),
    )
