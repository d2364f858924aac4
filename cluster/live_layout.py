"""A running cluster as the policies see it, and their moves as changes of the desired set.

A node is a host, an expert in a layer range of the grain a unit, and a replica holds every unit whose layers it has all
of. Which moves there are is a policy's decision. Letters as in `layout`.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from cluster.desired import DesiredReplica
from cluster.desired_set import DesiredSet, Footprint, MoveRefused
from cluster.ids import NodeId, ReplicaId
from cluster.layout import Grain, Host, Layout
from cluster.placement import NodeSlots
from cluster.policy import Copy, Drop

NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """Where replicas may be: the nodes that answer, those that give up what they have, and where each replica is.

    `expert_slots` bounds the units of a node; None leaves the bound to its GPUs and its memory. `speeds` are relative
    to the node that work is measured on, 1.0 where unknown. A node without GPUs works on as many units at once as it
    has processors for, `cpus_each` for a process.
    """

    nodes: tuple[NodeSlots, ...]
    places: Mapping[ReplicaId, NodeId]
    draining: Collection[NodeId] = ()
    expert_slots: int | None = None
    speeds: Mapping[NodeId, float] = field(default_factory=dict)
    cpus_each: float = 1.0


def layout_of(desired: DesiredSet, grain: Grain, ground: Ground) -> Layout:
    """Who should hold what, where. Replicas without a place are nowhere."""
    held: dict[NodeId, set[int]] = {node.node_id: set() for node in ground.nodes}
    there: dict[NodeId, list[DesiredReplica]] = {node.node_id: [] for node in ground.nodes}
    for one in desired.replicas:
        node_id = ground.places.get(one.replica_id)
        if node_id in held:
            held[node_id].update(units_of(one, grain))
            there[node_id].append(one)
    hosts = tuple(
        _host(node, there[node.node_id], held[node.node_id], grain, desired.footprint, ground) for node in ground.nodes
    )
    held_UN = np.zeros((grain.num_units, len(hosts)), np.bool_)
    for column, host in enumerate(hosts):
        held_UN[list(held[host.node_id]), column] = True
    return Layout(grain, hosts, held_UN)


def units_of(one: DesiredReplica, grain: Grain) -> list[int]:
    """Units that the replica holds whole."""
    last = one.first_layer + one.num_layers
    ranges = [
        which
        for which in range(grain.num_ranges)
        if one.first_layer <= grain.bounds[which] and grain.bounds[which + 1] <= last
    ]
    return [which * grain.num_experts + expert for which in ranges for expert in one.expert_ids]


def copy_unit(
    desired: DesiredSet, action: Copy, ground: Ground, grain: Grain, taken: Collection[ReplicaId] = ()
) -> tuple[DesiredSet, ReplicaId]:
    """The set with that copy, and the new replica's id. Raises MoveRefused where the node may not have it."""
    layers = grain.layers(action.unit)
    room = layout_of(desired, grain, ground)
    check_room(room, action.unit, action.node_id)
    return desired.copy(grain.expert(action.unit), range(layers.start, layers.stop), action.node_id, taken)


def check_room(layout: Layout, unit: int, node_id: NodeId) -> None:
    """Raise MoveRefused unless that node may get the unit, and say why not."""
    columns = [column for column, host in enumerate(layout.hosts) if host.node_id == node_id]
    if not columns:
        raise MoveRefused(f"there is no node {node_id!r} that answers")
    (column,) = columns
    host, what = layout.hosts[column], layout.grain.say(unit)
    if host.draining:
        raise MoveRefused(f"node {node_id} is draining: it gets nothing new")
    if layout.held_UN[unit, column]:
        raise MoveRefused(f"node {node_id} has {what} already")
    if layout.slots_free_N[column] < 1:
        raise MoveRefused(f"node {node_id} is full: it holds {int(layout.held_UN[:, column].sum())} of {host.slots}")
    if layout.bytes_free_N[column] < layout.grain.bytes_U[unit]:
        raise MoveRefused(
            f"node {node_id} has {int(layout.bytes_free_N[column])} bytes left, {what} needs "
            f"{int(layout.grain.bytes_U[unit])}"
        )


def drop_unit(
    desired: DesiredSet, action: Drop, ground: Ground, grain: Grain, taken: Collection[ReplicaId] = ()
) -> tuple[DesiredSet, tuple[ReplicaId, ...], tuple[ReplicaId, ...]]:
    """The set without that unit on that node, the replicas that go, and those that hold the rest of what they held.

    Raises MoveRefused where nobody there holds it, or too few others do.
    """
    layers = grain.layers(action.unit)
    there = [
        one
        for one in desired.replicas
        if ground.places.get(one.replica_id) == action.node_id and action.unit in units_of(one, grain)
    ]
    if not there:
        raise MoveRefused(f"nobody on node {action.node_id} holds {grain.say(action.unit)}")
    names = {*desired.ids, *taken}
    made: tuple[ReplicaId, ...] = ()
    expert, span = grain.expert(action.unit), range(layers.start, layers.stop)
    for one in there:
        desired, pieces = desired.drop(one.replica_id, expert, span, action.node_id, names)
        made += pieces
        names.update(pieces)
    return desired, tuple(one.replica_id for one in there), made


def _host(
    node: NodeSlots,
    there: Iterable[DesiredReplica],
    held: Collection[int],
    grain: Grain,
    footprint: Footprint,
    ground: Ground,
) -> Host:
    """What is free is counted in processes with one unit each, since that is what a copy becomes."""
    replicas = tuple(there)
    layers = int(grain.bytes_U.max()) // grain.layer_bytes
    need = footprint.host_bytes(1, layers)
    free_bytes = max(0, node.memory_bytes - sum(one.memory_bytes for one in replicas))
    free = free_bytes // need if need else NO_LIMIT
    if footprint.gpu > 0:
        left = node.gpu - sum(one.gpu for one in replicas)
        free = min(free, max(0, int((left + 1e-9) / footprint.gpu)))
    slots = min(len(held) + free, grain.num_units)
    if ground.expert_slots is not None:
        slots = min(slots, ground.expert_slots)
    bytes_held = int(grain.bytes_U[list(held)].sum())
    return Host(
        node_id=node.node_id,
        slots=slots,
        memory_bytes=min(bytes_held + free * int(grain.bytes_U.max()), NO_LIMIT),
        speed=ground.speeds.get(node.node_id, 1.0),
        draining=node.node_id in ground.draining,
        parallelism=max(1, int(node.gpu if footprint.gpu > 0 else node.cpu / ground.cpus_each)),
    )
