"""Which replica goes to which node.

What is placed stays where it is, also when a better place comes back. Newcomers that name a node go there; others are
spread: first away from other copies of the same expert, by node and by zone, then to where most is left. Coordinators
go where there are fewest experts. A node that was started for certain roles takes nobody else. Starting anything is not
done here.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from cluster.desired import DesiredReplica
from cluster.ids import CoordinatorId, ExpertId, NodeId, ReplicaId

EXPERT_HOST = "octavo_expert_host"
COORDINATOR_HOST = "octavo_coordinator_host"
"""Names of custom resources with which a node is started for experts or for coordinators only."""

ZONE_LABEL = "ray.io/availability-zone"
"""A node's label: what fails together. Nodes without one are a zone together."""

_ROLE = re.compile(r"octavo_[a-z]+_host")


def is_role(resource: str) -> bool:
    """Whether a custom resource of that name says what its node is for (or, with any other such name, for nobody)."""
    return _ROLE.fullmatch(resource) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSlots:
    """What a node offers to experts in all: GPUs, reservable CPUs, host memory; and what it is for, if it was said.

    Nodes with one `address` are on one machine.
    """

    node_id: NodeId
    gpu: float
    cpu: float
    memory_bytes: int
    labels: Mapping[str, str] = field(default_factory=dict)
    roles: frozenset[str] = frozenset()
    address: str = ""

    def takes(self, role: str) -> bool:
        """Whether processes of that role may be started here."""
        return not self.roles or role in self.roles


class PlacementError(Exception):
    """Some replicas fit on no node.

    `unplaced` has a reason for each, `placed` is the placement of all others, with which one may go on.
    """

    def __init__(self, unplaced: Mapping[ReplicaId, str], placed: Mapping[ReplicaId, NodeId]) -> None:
        first = next(iter(unplaced.items()))
        more = f", and {len(unplaced) - 1} more" if len(unplaced) > 1 else ""
        super().__init__(f"{first[0]} fits on no node: {first[1]}{more}")
        self.unplaced = dict(unplaced)
        self.placed = dict(placed)


@dataclass(slots=True)
class _Room:
    """A node while it is being filled."""

    slots: NodeSlots
    gpu: float = 0.0
    cpu: float = 0.0
    memory_bytes: int = 0
    num_replicas: int = 0
    copies: dict[ExpertId, int] = field(default_factory=dict)

    def take(self, replica: DesiredReplica, sign: int = 1) -> None:
        """Add a replica, or with sign -1 take it out again."""
        self.gpu += sign * replica.gpu
        self.cpu += sign * replica.cpu
        self.memory_bytes += sign * replica.memory_bytes
        self.num_replicas += sign
        for expert in replica.expert_ids:
            self.copies[expert] = self.copies.get(expert, 0) + sign

    def shared(self, replica: DesiredReplica) -> int:
        """Copies here of the experts that `replica` holds."""
        return sum(self.copies.get(expert, 0) for expert in replica.expert_ids)

    def lacks(self, replica: DesiredReplica) -> str | None:
        """What is too little for `replica` here, or None when it fits."""
        for name in ("gpu", "cpu", "memory_bytes"):
            free = getattr(self.slots, name) - getattr(self, name)
            wanted = getattr(replica, name)
            if wanted > free + 1e-9:
                return f"{name} {wanted:g} wanted, {free:g} free on {self.slots.node_id}"
        return None

    @property
    def zone(self) -> str:
        """What this node fails together with."""
        return self.slots.labels.get(ZONE_LABEL, "")

    def cost(self, replica: DesiredReplica, copies_by_zone: Mapping[str, int]) -> tuple[int, int, float, int, str]:
        """Order of preference: copies of the same experts here, in the zone; scarcest resource, replicas, id."""
        shares = [
            (getattr(self, name) + getattr(replica, name)) / getattr(self.slots, name)
            for name in ("gpu", "cpu", "memory_bytes")
            if getattr(replica, name)
        ]
        scarcest = max(shares, default=0.0)
        return self.shared(replica), copies_by_zone[self.zone], scarcest, self.num_replicas, self.slots.node_id


def place(
    replicas_wanted: Iterable[DesiredReplica],
    nodes: Iterable[NodeSlots],
    current: Mapping[ReplicaId, NodeId],
    *,
    shunned: Collection[NodeId] = (),
) -> dict[ReplicaId, NodeId]:
    """A node for every wanted replica; deterministic, whatever the order of the arguments.

    `current` is where replicas are; those that are wanted and whose node still exists stay there, even where
    that node is over-full. Nobody new goes to a node in `shunned`, or to another than it names. Two copies of one
    expert share a node only when no other node has room: two processes still survive the death of one.
    Raises PlacementError.
    """
    rooms = {slots.node_id: _Room(slots) for slots in nodes}
    wanted = _by_difficulty(replicas_wanted)
    placed: dict[ReplicaId, NodeId] = {}
    for replica in wanted:
        node_id = current.get(replica.replica_id)
        if node_id is not None and node_id in rooms:
            rooms[node_id].take(replica)
            placed[replica.replica_id] = node_id
    stayed = set(placed)
    unplaced: dict[ReplicaId, str] = {}
    for replica in wanted:
        if replica.replica_id in stayed:
            continue
        takers = [room for room in rooms.values() if room.slots.takes(EXPERT_HOST)]
        open_rooms = [room for room in takers if room.slots.node_id not in shunned]
        if replica.node_id is not None:
            open_rooms = [room for room in open_rooms if room.slots.node_id == replica.node_id]
        able = [room for room in open_rooms if room.lacks(replica) is None]
        if not able:
            nowhere = "no node answers" if takers else "no node is for experts" if rooms else "there is no node"
            if rooms and replica.node_id is not None:
                nowhere = f"{replica.node_id} does not answer"
            unplaced[replica.replica_id] = _why_not(replica, open_rooms, nowhere)
            continue
        copies = _copies_by_zone(replica, rooms.values())
        room = min(able, key=lambda candidate: candidate.cost(replica, copies))
        room.take(replica)
        placed[replica.replica_id] = room.slots.node_id
    newcomers = [r for r in wanted if r.replica_id in placed and r.replica_id not in stayed]
    _separate([r for r in newcomers if r.node_id is None], rooms, placed)
    if unplaced:
        raise PlacementError(unplaced, placed)
    return placed


def with_nodes(replicas: Iterable[DesiredReplica], placement: Mapping[ReplicaId, NodeId]) -> tuple[DesiredReplica, ...]:
    """The replicas with their nodes filled in from `placement`."""
    return tuple(replace(r, node_id=placement.get(r.replica_id, r.node_id)) for r in replicas)


def place_coordinators(
    coordinator_ids: Sequence[CoordinatorId],
    nodes: Iterable[NodeSlots],
    experts: Mapping[ReplicaId, NodeId],
    current: Mapping[CoordinatorId, NodeId],
) -> dict[CoordinatorId, NodeId]:
    """A node for every coordinator: apart from each other, then where there are fewest experts and most CPUs.

    Coordinators that are placed stay. Raises ValueError when there is no node at all.
    """
    slots = {node.node_id: node for node in nodes}
    if not slots:
        raise ValueError("there is no node for a coordinator")
    num_experts = dict.fromkeys(slots, 0)
    for node_id in experts.values():
        if node_id in num_experts:
            num_experts[node_id] += 1
    placed = {c: current[c] for c in coordinator_ids if current.get(c) in slots}
    for coordinator_id in coordinator_ids:
        if coordinator_id not in placed:
            held = list(placed.values())
            placed[coordinator_id] = min(slots, key=lambda n: (held.count(n), num_experts[n], -slots[n].cpu, n))
    return placed


def _by_difficulty(replicas: Iterable[DesiredReplica]) -> list[DesiredReplica]:
    """The largest first; of equal size, the first copies of all experts before anybody's second."""
    copies: Counter[tuple[ExpertId, ...]] = Counter()
    keyed: list[tuple[tuple[int, float, int, str], DesiredReplica]] = []
    for replica in sorted(replicas, key=lambda r: r.replica_id):
        keyed.append(((-replica.memory_bytes, -replica.gpu, copies[replica.expert_ids], replica.replica_id), replica))
        copies[replica.expert_ids] += 1
    return [replica for _, replica in sorted(keyed, key=lambda pair: pair[0])]


def _copies_by_zone(replica: DesiredReplica, rooms: Iterable[_Room]) -> Counter[str]:
    copies: Counter[str] = Counter()
    for room in rooms:
        copies[room.zone] += room.shared(replica)
    return copies


def _separate(
    newcomers: Sequence[DesiredReplica], rooms: Mapping[NodeId, _Room], placed: dict[ReplicaId, NodeId]
) -> None:
    """Swap newcomers of equal size between nodes while that parts copies of one expert; each swap parts more."""
    for one, other in product(newcomers, newcomers):
        home, away = rooms[placed[one.replica_id]], rooms[placed[other.replica_id]]
        sizes = [(r.gpu, r.cpu, r.memory_bytes) for r in (one, other)]
        if home is away or sizes[0] != sizes[1] or home.shared(one) == len(one.expert_ids):
            continue
        home.take(one, -1)
        away.take(other, -1)
        if away.shared(one) + home.shared(other) < home.shared(one) + away.shared(other):
            home, away = away, home
            placed[one.replica_id], placed[other.replica_id] = home.slots.node_id, away.slots.node_id
        home.take(one)
        away.take(other)


def _why_not(replica: DesiredReplica, rooms: Iterable[_Room], nowhere: str) -> str:
    reasons = [room.lacks(replica) for room in rooms]
    return next((reason for reason in reasons if reason is not None), nowhere)
