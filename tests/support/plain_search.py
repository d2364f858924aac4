"""`cluster.balance_search` without its arrays, as the oracle: each host, candidate and change by itself."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from cluster.balance_replacements import ROUNDING
from cluster.balance_search import _EXCHANGED, _SOURCES, _SPARED, _TARGETS, _TRIED, _UNITS, Step
from cluster.ids import NodeId
from cluster.layout import BoolArray, FloatArray, IntArray
from cluster.layout_draft import Draft


@dataclass(frozen=True, slots=True)
class _Candidate:
    unit: int
    source: int
    target: int
    layer: int
    is_move: bool


def best_step(draft: Draft, floor: int, forbidden: Collection[tuple[int, NodeId]], layers: slice) -> Step | None:
    """What `balance_search.best_step` answers."""
    before = draft.smooth_cost()
    best: Step | None = None
    for candidate, changes in _ways(draft, floor, forbidden, layers):
        step = _tried(draft, candidate, changes)
        if step.cost < before * (1 - 1e-6) and (best is None or _rate(step, before) > _rate(best, before)):
            best = step
    return best


def _ways(
    draft: Draft, floor: int, forbidden: Collection[tuple[int, NodeId]], layers: slice
) -> Iterator[tuple[_Candidate, tuple[tuple[int, int, bool], ...]]]:
    """What is worth trying: drops from the hosts that are waited for, and the most promising copies and moves."""
    spare_N: BoolArray = np.any(draft.held_UN & (draft.copies_U > floor)[:, None], axis=0)
    ranked: list[tuple[float, _Candidate]] = []
    for layer, host in _waited_for(draft, layers):
        for unit in _units_on(draft, layer, host).tolist():
            if draft.copies_U[unit] > floor:
                yield _Candidate(unit, host, host, layer, True), ((unit, host, False),)
        ranked += _ranked(draft, layer, host, spare_N, forbidden)
    ranked.sort(key=lambda pair: pair[0])
    for _, candidate in ranked[:_TRIED]:
        for changes in _changes(draft, candidate, floor, forbidden):
            yield candidate, changes
    waited_for = _waited_for(draft, layers)
    replaced = best_replacement(draft, floor, forbidden, layers) if waited_for else None
    if replaced is not None:
        unit, spare, target = replaced
        layer, source = waited_for[0]
        yield _Candidate(unit, source, target, layer, False), ((spare, target, False), (unit, target, True))


def best_replacement(
    draft: Draft, floor: int, forbidden: Collection[tuple[int, NodeId]], layers: slice
) -> tuple[int, int, int] | None:
    """What `balance_replacements.best_replacement` answers."""
    first, hosts = draft.grain.unit(layers.start, 0), draft.layout.hosts
    units = range(first, first + draft.grain.num_experts)
    able = [
        n for n in range(len(hosts)) if draft.open_N[n] and draft.slots_free_N[n] >= 0 and draft.bytes_free_N[n] >= 0
    ]
    ways = [
        (unit, spare, host)
        for unit, spare, host in product(units, units, able)
        if draft.held_UN[spare, host]
        and draft.copies_U[spare] > floor
        and not draft.held_UN[unit, host]
        and 1 <= draft.copies_U[unit] < draft.most_U[unit]
        and (unit, hosts[host].node_id) not in forbidden
    ]
    if not ways or draft.is_parallel:
        return None
    costs = [cost_after(draft, ((spare, host, False), (unit, host, True))) for unit, spare, host in ways]
    return next(way for way, cost in zip(ways, costs, strict=True) if cost <= min(costs) * (1 + ROUNDING))


def _rate(step: Step, before: float) -> float:
    return (before - step.cost) / step.price_bytes


def _waited_for(draft: Draft, layers: slice) -> list[tuple[int, int]]:
    """(layer, its busiest host) of the layers that lose most to imbalance, one for each host."""
    busy_lN = draft.busy_LN[layers]
    excess_l = busy_lN.max(axis=1) - draft.even(layers)
    found: dict[int, int] = {}
    for index in np.argsort(-excess_l, kind="stable").tolist():
        if excess_l[index] <= 0 or len(found) == _SOURCES:
            break
        found.setdefault(int(busy_lN[index].argmax()), layers.start + index)
    return [(layer, host) for host, layer in found.items()]


def _ranked(
    draft: Draft,
    layer: int,
    host: int,
    spare_N: np.ndarray,
    forbidden: Collection[tuple[int, NodeId]],
) -> Iterator[tuple[float, _Candidate]]:
    """The most promising candidates that relieve this host, with an estimate of the cost's change."""
    first = draft.grain.unit(layer, 0)
    units = _units_on(draft, layer, host)
    layers = draft.grain.layers(first)
    rooms = (draft.slots_free_N >= 1) & (draft.bytes_free_N >= draft.grain.bytes_U[first])
    able = np.flatnonzero(draft.open_N & (np.arange(len(rooms)) != host))
    targets = able[np.argsort(draft.busy_LN[layers][:, able].sum(axis=0), kind="stable")][:_TARGETS]
    if not len(units) or not len(targets):
        return
    copy_KT, move_KT = _estimates(draft, layers, host, units, targets)
    taken_KT = draft.held_UN[np.ix_(units, targets)]
    copy_KT[taken_KT | ~(rooms | spare_N)[targets]] = np.inf
    copy_KT[draft.copies_U[units] >= draft.most_U[units]] = np.inf
    move_KT[taken_KT] = np.inf
    hosts = draft.layout.hosts
    for k, t in np.ndindex(taken_KT.shape):
        if (int(units[k]), hosts[targets[t]].node_id) in forbidden:
            copy_KT[k, t] = move_KT[k, t] = np.inf
    for is_move, change_KT in ((False, copy_KT), (True, move_KT)):
        for flat in np.argsort(change_KT, axis=None, kind="stable")[:_TRIED].tolist():
            k, t = divmod(flat, len(targets))
            if change_KT[k, t] < 0:
                yield float(change_KT[k, t]), _Candidate(int(units[k]), host, int(targets[t]), layer, is_move)


def _units_on(draft: Draft, layer: int, host: int) -> IntArray:
    """Units of the layer on the host, those that give it most to do first."""
    first = draft.grain.unit(layer, 0)
    units = first + np.flatnonzero(draft.held_UN[first : first + draft.grain.num_experts, host])
    share_K = draft.work_LE[layer, units - first] / draft.copies_U[units]
    return units[np.argsort(-share_K, kind="stable")][:_UNITS]


def _estimates(
    draft: Draft, layers: slice, host: int, units: IntArray, targets: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Change of the smooth cost by a copy of unit k on target t, and by its move from `host` there; each (K, T).

    What must leave a full target is not counted here.
    """
    scale = max(float(draft.busy_LN[layers].max()), 1e-300)
    powers_lN = _power(draft.busy_LN[layers] / scale)
    power_l = powers_lN.sum(axis=1)
    copy_KT, move_KT = np.empty((len(units), len(targets))), np.empty((len(units), len(targets)))

    def change(hosts_that_give: list[int], less: float, target: int, more: float, unit: int) -> float:
        gives = [(n, -less / draft.speed_N[n]) for n in hosts_that_give]
        relief = sum(_power(_busy_after(draft, layers, n, unit, by) / scale) - powers_lN[:, n] for n, by in gives)
        added = _power(_busy_after(draft, layers, target, unit, more / draft.speed_N[target]) / scale)
        after = np.maximum(power_l + relief + (added - powers_lN[:, target]), 0.0)
        return float((_root(after) - _root(power_l)).sum()) * scale

    for k, t in np.ndindex(copy_KT.shape):
        unit, target = int(units[k]), int(targets[t])
        copies = int(draft.copies_U[unit])
        copy_KT[k, t] = change(draft.holders(unit), 1 / (copies * (copies + 1)), target, 1 / (copies + 1), unit)
        move_KT[k, t] = change([host], 1 / copies, target, 1 / copies, unit)
    return copy_KT, move_KT


def _busy_after(draft: Draft, layers: slice, host: int, unit: int, by: float) -> FloatArray:
    """Busy share of the host in these layers once it works `by` s more for each second of the unit's work."""
    first, num_experts = draft.grain.unit(layers.start, 0), draft.grain.num_experts
    shares = [
        float(draft.held_UN[one, host]) / max(int(draft.copies_U[one]), 1) / float(draft.speed_N[host])
        for one in range(first, first + num_experts)
    ]
    shares[unit - first] += by
    largest_l = np.max([draft.work_LE[layers, e] * share for e, share in enumerate(shares)], axis=0)
    sum_l = draft.sum_LN[layers, host] + draft.work_LE[layers, unit - first] * by
    parallelism = int(draft.parallel_N[host])
    busy_l: FloatArray = sum_l if parallelism == 1 else np.maximum(sum_l / parallelism, largest_l)
    return busy_l


def _power(x: FloatArray) -> FloatArray:
    """x to the 8th (`layout_draft.STEEPNESS`), many times faster than `**`."""
    squared = x * x
    fourth = squared * squared
    return fourth * fourth


def _root(x: FloatArray) -> FloatArray:
    root: FloatArray = np.sqrt(np.sqrt(np.sqrt(x)))
    return root


def _changes(
    draft: Draft, candidate: _Candidate, floor: int, forbidden: Collection[tuple[int, NodeId]]
) -> Iterator[tuple[tuple[int, int, bool], ...]]:
    """Ways to carry the candidate out, each in an order that never leaves a unit unserved nor a host over-full."""
    unit, source, target = candidate.unit, candidate.source, candidate.target
    arrive = (unit, target, True)
    leave = ((unit, source, False),) if candidate.is_move else ()
    if draft.has_room(unit, target):
        yield (arrive, *leave)
        return
    for spare in _spare_units(draft, target, unit, floor)[:_SPARED]:
        yield ((spare, target, False), arrive, *leave)
    if candidate.is_move:
        yield from _exchanges(draft, candidate, forbidden)


def _exchanges(
    draft: Draft, candidate: _Candidate, forbidden: Collection[tuple[int, NodeId]]
) -> Iterator[tuple[tuple[int, int, bool], ...]]:
    """The unit against a lighter one of the target that is served elsewhere meanwhile."""
    unit, source, target = candidate.unit, candidate.source, candidate.target
    hosts, size = draft.layout.hosts, draft.grain.bytes_U
    if not draft.open_N[source]:
        return
    others = np.flatnonzero(draft.held_UN[:, target] & ~draft.held_UN[:, source] & (draft.copies_U >= 2))
    lightest = sorted(others.tolist(), key=lambda u: (float(draft.work(u).sum()) / int(draft.copies_U[u]), u))
    for other in lightest[:_EXCHANGED]:
        fits_there = draft.slots_free_N[target] >= 0 and draft.bytes_free_N[target] + size[other] >= size[unit]
        fits_here = draft.slots_free_N[source] >= 0 and draft.bytes_free_N[source] + size[unit] >= size[other]
        if fits_there and fits_here and (other, hosts[source].node_id) not in forbidden:
            yield ((other, target, False), (unit, target, True), (unit, source, False), (other, source, True))


def _tried(draft: Draft, candidate: _Candidate, changes: tuple[tuple[int, int, bool], ...]) -> Step:
    cost = cost_after(draft, changes)
    num_bytes = sum(int(draft.grain.bytes_U[unit]) for unit, _, held in changes if held)
    price_bytes = max(num_bytes, int(draft.grain.bytes_U[candidate.unit]))
    return Step(changes, num_bytes, price_bytes, cost, candidate.unit, candidate.source, candidate.layer)


def cost_after(draft: Draft, changes: tuple[tuple[int, int, bool], ...]) -> float:
    """The smooth cost once these are done; the draft is as before."""
    before = draft.loads
    draft.redo(changes)
    cost = draft.smooth_cost()
    draft.undo(changes, before)
    return cost


def _spare_units(draft: Draft, host: int, unit: int, floor: int) -> list[int]:
    if draft.slots_free_N[host] < 0:
        return []
    held = np.flatnonzero(draft.held_UN[:, host] & (draft.copies_U > floor))
    fits = draft.bytes_free_N[host] + draft.grain.bytes_U[held] >= draft.grain.bytes_U[unit]

    def missed(u: int) -> tuple[float, int]:
        copies = int(draft.copies_U[u])
        return float(draft.work(u).sum()) / (copies * (copies - 1)), u

    return sorted((int(u) for u in held[fits] if u != unit), key=missed)
