"""Who holds which experts: the immutable, versioned map from (layer, expert) to replicas.

A new map is made, never changed; to switch maps is to assign a pointer between two steps. Which replicas
belong in it is `reconcile`'s decision, which of them serves a batch is `selector`'s.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId


class ExpertMapError(ValueError):
    """A map that contradicts itself. Names the replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaInfo:
    """One replica that can be called: it holds `expert_ids` in layers first_layer .. first_layer + num_layers.

    `address` is host:port of its ExpertService. `numerics_domain` says whose bits its results have: replicas
    of one expert must agree on it.
    """

    replica_id: ReplicaId
    expert_ids: tuple[ExpertId, ...]
    first_layer: LayerId
    num_layers: int
    address: str
    node_id: NodeId
    numerics_domain: str

    @property
    def layers(self) -> range:
        """Layers held."""
        return range(self.first_layer, self.first_layer + self.num_layers)


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Replicas of all experts of a model with `num_layers` layers of `num_experts` experts, as of `epoch`.

    Checked at construction. A map may be incomplete: see `missing`.
    """

    epoch: int
    num_layers: int
    num_experts: int
    replicas: tuple[ReplicaInfo, ...]
    _index: Mapping[tuple[int, int], tuple[ReplicaInfo, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "replicas", tuple(sorted(self.replicas, key=lambda r: r.replica_id)))
        self.check()
        index: dict[tuple[int, int], tuple[ReplicaInfo, ...]] = {}
        for replica in self.replicas:
            for place in ((layer, expert) for layer in replica.layers for expert in replica.expert_ids):
                index[place] = (*index.get(place, ()), replica)
        object.__setattr__(self, "_index", index)

    def check(self) -> None:
        """Raise ExpertMapError unless ids and addresses are unique, in range, and numerics domains agree."""
        if self.epoch < 0 or self.num_layers < 1 or self.num_experts < 1:
            raise ExpertMapError(
                f"a map of epoch {self.epoch} with {self.num_layers} layers of {self.num_experts} experts"
            )
        for replica in self.replicas:
            self._check_replica(replica)
        for name in ("replica_id", "address"):
            values = [getattr(replica, name) for replica in self.replicas]
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ExpertMapError(f"{name} {twice[0]!r} is in the map twice")
        _, strangers = agreeing(self.replicas, ())
        if strangers:
            raise ExpertMapError(
                f"{strangers[0].replica_id} computes in numerics domain {strangers[0].numerics_domain!r}, "
                "other than an earlier replica of the same expert"
            )

    def _check_replica(self, replica: ReplicaInfo) -> None:
        name = replica.replica_id
        if not replica.expert_ids or len(set(replica.expert_ids)) != len(replica.expert_ids):
            raise ExpertMapError(f"{name} holds experts {replica.expert_ids}; each must be there once")
        if min(replica.expert_ids) < 0 or max(replica.expert_ids) >= self.num_experts:
            raise ExpertMapError(f"{name} holds experts {replica.expert_ids}, but there are {self.num_experts}")
        last = replica.first_layer + replica.num_layers
        if replica.first_layer < 0 or replica.num_layers < 1 or last > self.num_layers:
            raise ExpertMapError(f"{name} holds layers {replica.first_layer}..{last}, but there are {self.num_layers}")
        if not replica.address:
            raise ExpertMapError(f"{name} has no address")

    def replicas_for(self, layer: LayerId, expert: ExpertId) -> tuple[ReplicaInfo, ...]:
        """Replicas that hold the expert in this layer, by id; empty when there is none."""
        return self._index.get((layer, expert), ())

    def missing(self) -> tuple[tuple[LayerId, ExpertId], ...]:
        """Every (layer, expert) that nobody holds."""
        return tuple(
            (LayerId(layer), ExpertId(expert))
            for layer in range(self.num_layers)
            for expert in range(self.num_experts)
            if (layer, expert) not in self._index
        )

    def with_replicas(self, replicas: Iterable[ReplicaInfo]) -> "ExpertMap":
        """The next epoch's map, with exactly these replicas."""
        return ExpertMap(self.epoch + 1, self.num_layers, self.num_experts, tuple(replicas))


def agreeing(
    replicas: Iterable[ReplicaInfo], serving: Iterable[ReplicaInfo]
) -> tuple[tuple[ReplicaInfo, ...], tuple[ReplicaInfo, ...]]:
    """Split replicas into those that can share a map and those whose numerics domain is not their expert's.

    An expert's domain is that of its replica with the lowest id among those in `serving` that are still
    there, and else of the lowest id. Exactness is claimed only within one domain, so the others must not
    serve beside them.
    """
    before = {replica.replica_id: replica.numerics_domain for replica in serving}
    domains: dict[ExpertId, str] = {}
    kept: list[ReplicaInfo] = []
    strangers: list[ReplicaInfo] = []

    def rank(replica: ReplicaInfo) -> tuple[bool, str]:
        return before.get(replica.replica_id) != replica.numerics_domain, replica.replica_id

    for replica in sorted(replicas, key=rank):
        domain = replica.numerics_domain
        if any(domains.get(expert, domain) != domain for expert in replica.expert_ids):
            strangers.append(replica)
            continue
        kept.append(replica)
        domains.update(dict.fromkeys(replica.expert_ids, domain))
    return tuple(kept), tuple(strangers)
