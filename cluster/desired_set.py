"""Which replicas there should be, as one immutable value that balancing and people change: copy, drop, drain, fold.

It begins as `cluster.desired` has it from the configuration. Every change gives a new set, keeps `min_copies` of each
expert in each layer, or raises MoveRefused. What follows for processes is `reconcile`'s: who is not in the set any more
serves until others do.

L layers, E experts.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.desired import DesiredReplica
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from cluster.layout import IntArray
from cluster.replica_names import free_name, read_name


class MoveRefused(ValueError):
    """A change that is not made. One line that says why, for a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a replica's process takes: GPUs, host memory before its weights and for one expert in one layer.

    `layer_bytes` is that expert's size in one layer wherever it is; `host_layer_bytes` is 0 where it is on a GPU.
    """

    gpu: float = 0.0
    base_bytes: int = 0
    host_layer_bytes: int = 0
    layer_bytes: int = 1

    def host_bytes(self, num_experts: int, num_layers: int) -> int:
        """Host memory of a process with so many experts in so many layers each."""
        return self.base_bytes + num_experts * num_layers * self.host_layer_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredSet:
    """The replicas that should be. A `node_id` in one of them is where it must go; others are placed."""

    num_layers: int
    num_experts: int
    min_copies: int
    footprint: Footprint
    replicas: tuple[DesiredReplica, ...]

    @property
    def ids(self) -> frozenset[ReplicaId]:
        """Their ids."""
        return frozenset(one.replica_id for one in self.replicas)

    @property
    def copies_LE(self) -> IntArray:
        """Replicas that should hold each expert in each layer."""
        return count_places(self.replicas, self.num_layers, self.num_experts)

    def get(self, replica_id: ReplicaId) -> DesiredReplica:
        """The replica of that id. Raises MoveRefused."""
        for one in self.replicas:
            if one.replica_id == replica_id:
                return one
        raise MoveRefused(f"there is no replica {replica_id!r}; see octavo experts list")

    def layers_of(self, one: DesiredReplica) -> range:
        """Layers that it holds."""
        return range(one.first_layer, one.first_layer + one.num_layers)

    def copy(
        self, expert: int, layers: range, node_id: NodeId, taken: Collection[ReplicaId] = ()
    ) -> tuple["DesiredSet", ReplicaId]:
        """With one more replica, of this expert in these layers, on that node; and its id.

        Ids in `taken` are not used: those of processes that are still about to end. Raises MoveRefused.
        """
        self.check_place(expert, layers)
        made = self._made((ExpertId(expert),), layers, node_id, {*self.ids, *taken})
        return replace(self, replicas=(*self.replicas, made)), made.replica_id

    def drop(
        self,
        replica_id: ReplicaId,
        expert: int,
        layers: range,
        node_id: NodeId | None,
        taken: Collection[ReplicaId] = (),
    ) -> tuple["DesiredSet", tuple[ReplicaId, ...]]:
        """Without this expert in these layers in that replica; replicas of what else it holds take its place.

        Those are named; they go to `node_id`, where it is. Raises MoveRefused.
        """
        one = self.get(replica_id)
        held = self.layers_of(one)
        layers = range(max(layers.start, held.start), min(layers.stop, held.stop))
        if expert not in one.expert_ids or not layers:
            raise MoveRefused(f"{replica_id} does not hold expert {expert} in layers {_span(layers)}")
        self._check_kept([(expert, layers)])
        before, after = range(held.start, layers.start), range(layers.stop, held.stop)
        others = tuple(other for other in one.expert_ids if other != expert)
        rest = [(one.expert_ids, before), (others, layers), (one.expert_ids, after)]
        names = {*self.ids, *taken}
        pieces: list[DesiredReplica] = []
        for experts, piece in rest:
            if experts and piece:
                pieces.append(self._made(experts, piece, node_id, names))
                names.add(pieces[-1].replica_id)
        kept = tuple(other for other in self.replicas if other is not one)
        return replace(self, replicas=(*kept, *pieces)), tuple(piece.replica_id for piece in pieces)

    def drain(self, replica_id: ReplicaId) -> "DesiredSet":
        """Without that replica. Raises MoveRefused where too few copies would be left."""
        one = self.get(replica_id)
        self._check_kept([(expert, self.layers_of(one)) for expert in one.expert_ids])
        return self.without([replica_id])

    def without(self, replica_ids: Collection[ReplicaId]) -> "DesiredSet":
        """Without these, unchecked: for what has never come to be."""
        return replace(self, replicas=tuple(one for one in self.replicas if one.replica_id not in replica_ids))

    def with_more(self, replicas: Iterable[DesiredReplica]) -> "DesiredSet":
        """With these, too: for what was to go and stays."""
        return replace(self, replicas=(*self.replicas, *(one for one in replicas if one.replica_id not in self.ids)))

    def fold(self, num_groups: int, taken: Collection[ReplicaId] = ()) -> "DesiredSet":
        """`min_copies` replicas of each of `num_groups` groups of consecutive experts, all layers each, and no others.

        Replicas that are already so stay as they are. Raises MoveRefused.
        """
        if not 1 <= num_groups <= self.num_experts or self.num_experts % num_groups:
            raise MoveRefused(f"{self.num_experts} experts do not come out even in {num_groups} groups")
        size = self.num_experts // num_groups
        layers = range(self.num_layers)
        names = {*self.ids, *taken}
        after: list[DesiredReplica] = []
        for first in range(0, self.num_experts, size):
            experts = tuple(map(ExpertId, range(first, first + size)))
            there = [one for one in self.replicas if one.expert_ids == experts and self.layers_of(one) == layers]
            after += there[: self.min_copies]
            for _ in range(self.min_copies - len(there)):
                after.append(self._made(experts, layers, None, names))
                names.add(after[-1].replica_id)
        return replace(self, replicas=tuple(after))

    def rebuilt(self, running: Iterable[ReplicaId]) -> "DesiredSet":
        """What a new supervisor desires: what runs, as its names say, and of these replicas those still needed.

        Names that say nothing, or what this model does not have, are left out.
        """
        found = [one for one in map(self._read, sorted(running)) if one is not None]
        copies_LE = count_places(found, self.num_layers, self.num_experts)
        for one in self.replicas:
            place = np.ix_(list(self.layers_of(one)), one.expert_ids)
            if (copies_LE[place] < self.min_copies).any() and all(one.replica_id != it.replica_id for it in found):
                found.append(one)
                copies_LE[place] += 1
        return replace(self, replicas=tuple(sorted(found, key=lambda one: one.replica_id)))

    def released(self, gone: Collection[NodeId], places: Mapping[ReplicaId, NodeId]) -> "DesiredSet":
        """After these nodes are gone: who was or had to be there may be anywhere, or is not needed with enough others.

        `places` is where replicas were.
        """
        lost = [one for one in self.replicas if one.node_id in gone or places.get(one.replica_id) in gone]
        if not lost:
            return self
        kept = [one for one in self.replicas if one not in lost]
        copies_LE = count_places(kept, self.num_layers, self.num_experts)
        for one in lost:
            place = np.ix_(list(self.layers_of(one)), one.expert_ids)
            if (copies_LE[place] < self.min_copies).any():
                kept.append(replace(one, node_id=None))
                copies_LE[place] += 1
        return replace(self, replicas=tuple(sorted(kept, key=lambda one: one.replica_id)))

    def moved_off(
        self, node_id: NodeId, places: Mapping[ReplicaId, NodeId], taken: Collection[ReplicaId] = ()
    ) -> "DesiredSet":
        """With another replica, anywhere, for each that is or must be on this node, unless enough others hold the same.

        `places` is where replicas are; ids in `taken` are not used.
        """
        there = [one for one in self.replicas if places.get(one.replica_id, one.node_id) == node_id]
        kept = [one for one in self.replicas if one not in there]
        copies_LE = count_places(kept, self.num_layers, self.num_experts)
        names = {*self.ids, *taken}
        for one in there:
            place = np.ix_(list(self.layers_of(one)), one.expert_ids)
            if (copies_LE[place] < self.min_copies).any():
                kept.append(self._made(one.expert_ids, self.layers_of(one), None, names))
                names.add(kept[-1].replica_id)
                copies_LE[place] += 1
        return replace(self, replicas=tuple(kept))

    def check_place(self, expert: int, layers: range) -> None:
        """Raise MoveRefused unless the model has this expert and these layers."""
        if not 0 <= expert < self.num_experts:
            raise MoveRefused(f"there is no expert {expert}: the model has 0 to {self.num_experts - 1}")
        if not layers or layers.start < 0 or layers.stop > self.num_layers:
            raise MoveRefused(f"layers {_span(layers)} are not within 0-{self.num_layers - 1}, those of the model")

    def _check_kept(self, taken_away: Iterable[tuple[int, range]]) -> None:
        copies_LE = self.copies_LE
        for expert, layers in taken_away:
            left = int(copies_LE[layers.start : layers.stop, expert].min()) - 1
            if left < self.min_copies:
                what = "the last copy" if left == 0 else f"one of {left + 1} copies"
                wanted = f"at least {self.min_copies} must stay (replicas)"
                raise MoveRefused(f"it is {what} of expert {expert}, of which {wanted}")

    def _made(
        self, experts: Sequence[ExpertId], layers: range, node_id: NodeId | None, names: Collection[ReplicaId]
    ) -> DesiredReplica:
        partial = None if layers == range(self.num_layers) else layers
        return self._replica(free_name(experts, partial, names), experts, layers, node_id)

    def _replica(
        self, replica_id: ReplicaId, experts: Sequence[ExpertId], layers: range, node_id: NodeId | None
    ) -> DesiredReplica:
        return DesiredReplica(
            replica_id=replica_id,
            expert_ids=tuple(experts),
            first_layer=LayerId(layers.start),
            num_layers=len(layers),
            gpu=self.footprint.gpu,
            memory_bytes=self.footprint.host_bytes(len(experts), len(layers)),
            node_id=node_id,
        )

    def _read(self, replica_id: ReplicaId) -> DesiredReplica | None:
        for one in self.replicas:
            if one.replica_id == replica_id:
                return one
        held = read_name(replica_id)
        if held is None or max(held.expert_ids) >= self.num_experts:
            return None
        layers = range(self.num_layers) if held.layers is None else held.layers
        return self._replica(replica_id, held.expert_ids, layers, None) if layers.stop <= self.num_layers else None


def count_places(replicas: Iterable[DesiredReplica], num_layers: int, num_experts: int) -> IntArray:
    """How many of the replicas hold each expert in each layer, shape (L, E)."""
    copies_LE: IntArray = np.zeros((num_layers, num_experts), np.int64)
    for one in replicas:
        copies_LE[one.first_layer : one.first_layer + one.num_layers, list(one.expert_ids)] += 1
    return copies_LE


def _span(layers: range) -> str:
    return f"{layers.start}-{layers.stop - 1}"
