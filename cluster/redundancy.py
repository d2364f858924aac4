"""How many copies of each expert there are, of how many there should be, and what to say when that changes.

Restoring copies is `cluster.reconcile`'s work; here it is only counted and told.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from cluster.desired import DesiredReplica
from cluster.expert_map import ExpertMap
from cluster.ids import ExpertId, LayerId


@dataclass(frozen=True, slots=True)
class Copies:
    """Copies of one expert: in the map, counted in the layer that has fewest, and wanted."""

    ready: int
    wanted: int


@dataclass(frozen=True, slots=True)
class RedundancyState:
    """Carried from one call of `follow` to the next.

    `copies` is what was counted last, `lacking_since_s` when an expert that had all its copies lost the first of them.
    """

    copies: Mapping[ExpertId, Copies] = field(default_factory=dict)
    lacking_since_s: Mapping[ExpertId, float] = field(default_factory=dict)
    was_whole: frozenset[ExpertId] = frozenset()


def count_copies(desired: Iterable[DesiredReplica], current: ExpertMap) -> dict[ExpertId, Copies]:
    """Copies of every expert of the model."""
    replicas = tuple(desired)
    layers = range(current.num_layers)
    found = {}
    for expert in map(ExpertId, range(current.num_experts)):
        held = [[one for one in replicas if expert in one.expert_ids and _has(one, layer)] for layer in layers]
        ready = [current.replicas_for(LayerId(layer), expert) for layer in layers]
        found[expert] = Copies(min(map(len, ready)), min(map(len, held)))
    return found


def follow(
    state: RedundancyState, copies: Mapping[ExpertId, Copies], now_s: float
) -> tuple[tuple[str, ...], RedundancyState]:
    """What to say about the difference to last time, and the next state.

    Nothing is said of an expert until it has had all its copies once: before, it is only being started. So it is when
    more copies are wanted than before and none was lost.
    """
    grown = {expert for expert, now in copies.items() if _has_grown(state.copies.get(expert), now)}
    state = replace(state, was_whole=state.was_whole - grown)
    whole = {expert for expert, now in copies.items() if now.ready >= now.wanted}
    lacking = {
        expert: state.lacking_since_s.get(expert, now_s) for expert in copies if expert in state.was_whole - whole
    }
    said: dict[str, list[ExpertId]] = {}
    for expert, now in copies.items():
        if expert not in state.was_whole or state.copies.get(expert) == now:
            continue
        text = f"{now.ready} of {now.wanted} {'copy' if now.wanted == 1 else 'copies'}"
        if expert in whole:
            since_s = state.lacking_since_s.get(expert)
            if since_s is None:
                continue  # more than enough, or fewer wanted
            text += f" again after {now_s - since_s:.1f} s"
        said.setdefault(text, []).append(expert)
    events = tuple(f"{_names(experts)} {text}" for text, experts in said.items())
    return events, RedundancyState(dict(copies), lacking, state.was_whole | whole)


def _has_grown(before: Copies | None, now: Copies) -> bool:
    return before is not None and now.wanted > before.wanted and now.ready >= before.ready


def _has(replica: DesiredReplica, layer: int) -> bool:
    return replica.first_layer <= layer < replica.first_layer + replica.num_layers


def _names(experts: list[ExpertId]) -> str:
    if len(experts) == 1:
        return f"expert {experts[0]} has"
    return f"experts {', '.join(map(str, experts))} have"
