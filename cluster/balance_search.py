"""The next small change that shortens the wait for the busiest hosts most per byte: one copy, move, or exchange.

Looks at the hosts that steps wait for, and at the least busy ones. A greedy search: each step is judged by trying it
on the draft. Whether the gain is worth it is `incremental`'s decision. Letters as in `layout`; K candidate units, T
targets.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.balance_replacements import best_replacement
from cluster.balance_trials import Changes, costs_after
from cluster.ids import NodeId
from cluster.layout import BoolArray, FloatArray, IntArray, as_busy
from cluster.layout_draft import Draft, largest_of
from cluster.mending import spare_units

# Bounds of the search, so that a decision's time is bounded too.
_SOURCES = 2
_UNITS = 8
_TARGETS = 64
_TRIED = 4
_EXCHANGED = 3
_SPARED = 2


@dataclass(frozen=True, slots=True)
class Step:
    """Changes as (unit, host, held), valid one after another; `cost` is the draft's smooth cost after them.

    `price_bytes` is what a step is compared by: what it loads, or for a drop the unit's size, since a drop gives away
    what was paid for.
    """

    changes: Changes
    num_bytes: int
    price_bytes: int
    cost: float
    unit: int
    source: int
    layer: int


@dataclass(frozen=True, slots=True)
class _Candidate:
    unit: int
    source: int
    target: int
    layer: int
    is_move: bool


def best_step(draft: Draft, floor: int, forbidden: Collection[tuple[int, NodeId]], layers: slice) -> Step | None:
    """The step with the largest gain per byte for these layers, one range of the grain; None when none gains.

    What it costs other layers, where a copy of theirs must go, counts against it. The draft is as before.
    """
    before_L = draft.smooth_costs()
    before = float(before_L.sum())
    ways = list(_ways(draft, floor, forbidden, layers))
    costs = costs_after(draft, [changes for _, changes in ways], before_L).tolist()
    best: tuple[float, Step] | None = None
    for (candidate, changes), cost in zip(ways, costs, strict=True):
        if cost < before * (1 - 1e-6):
            step = _as_step(draft, candidate, changes, cost)
            rate = (before - cost) / step.price_bytes
            if best is None or rate > best[0]:
                best = rate, step
    return best and best[1]


def in_one(draft: Draft, steps: Sequence[Step]) -> Step | None:
    """One step to the same end with fewer loads, where some of these undo what others did; None where none do.

    The draft, on which none of them is done yet, is as before.
    """
    wanted = {(unit, host): held for step in steps for unit, host, held in step.changes}
    left = {at: held for at, held in wanted.items() if bool(draft.held_UN[at]) != held}
    num_bytes = sum(int(draft.grain.bytes_U[unit]) for (unit, _), held in left.items() if held)
    if num_bytes >= sum(step.num_bytes for step in steps):
        return None
    before, done = draft.loads, list[tuple[int, int, bool]]()
    while (at := _next_of(draft, left)) is not None:
        done.append((*at, left.pop(at)))
        draft.redo(done[-1:])
    draft.undo(done, before)
    first, price_bytes = steps[0], sum(step.price_bytes for step in steps)
    if left:
        return None
    return replace(first, changes=tuple(done), num_bytes=num_bytes, price_bytes=price_bytes, cost=steps[-1].cost)


def _next_of(draft: Draft, left: Mapping[tuple[int, int], bool]) -> tuple[int, int] | None:
    """A change that is valid now: a copy that has room, else a drop of the unit with most copies; else None."""
    room = next((at for at, held in left.items() if held and draft.has_room(*at)), None)
    drops = [at for at, held in left.items() if not held and draft.copies_U[at[0]] >= 2]
    return max(drops, key=lambda at: int(draft.copies_U[at[0]]), default=None) if room is None else room


def _as_step(draft: Draft, candidate: _Candidate, changes: Changes, cost: float) -> Step:
    num_bytes = sum([int(draft.grain.bytes_U[unit]) for unit, _, held in changes if held])
    price_bytes = max(num_bytes, int(draft.grain.bytes_U[candidate.unit]))
    return Step(changes, num_bytes, price_bytes, cost, candidate.unit, candidate.source, candidate.layer)


def _ways(
    draft: Draft, floor: int, forbidden: Collection[tuple[int, NodeId]], layers: slice
) -> Iterator[tuple[_Candidate, Changes]]:
    """What is worth trying: drops from the hosts that are waited for, the most promising copies and moves, and the best
    copy in the place of a spare one.
    """
    waited_for = [(layer, host, _units_on(draft, layer, host)) for layer, host in _waited_for(draft, layers)]
    for layer, host, units in waited_for:
        for unit in units.tolist():
            if draft.copies_U[unit] > floor:
                yield _Candidate(unit, host, host, layer, True), ((unit, host, False),)
    for candidate in _promising(draft, floor, forbidden, layers, waited_for):
        for changes in _changes(draft, candidate, floor, forbidden):
            yield candidate, changes
    replaced = best_replacement(draft, floor, forbidden, layers) if waited_for else None
    if replaced is not None:
        unit, spare, target = replaced
        layer, source, _ = waited_for[0]
        yield _Candidate(unit, source, target, layer, False), ((spare, target, False), (unit, target, True))


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


def _units_on(draft: Draft, layer: int, host: int) -> IntArray:
    """Units of the layer on the host, those that give it most to do first."""
    first = draft.grain.unit(layer, 0)
    units = first + np.flatnonzero(draft.held_UN[first : first + draft.grain.num_experts, host])
    share_K = draft.work_LE[layer, units - first] / draft.copies_U[units]
    return units[np.argsort(-share_K, kind="stable")][:_UNITS]


def _promising(
    draft: Draft,
    floor: int,
    forbidden: Collection[tuple[int, NodeId]],
    layers: slice,
    waited_for: list[tuple[int, int, IntArray]],
) -> list[_Candidate]:
    """The copies and moves that relieve these hosts most, by an estimate; `waited_for` has (layer, host, units)."""
    able = np.flatnonzero(draft.open_N)
    targets = able[np.argsort(draft.busy_LN[layers][:, able].sum(axis=0), kind="stable")][:_TARGETS]
    kinds = [
        _Candidate(unit, host, host, layer, is_move)
        for layer, host, units in waited_for
        for is_move in (False, True)
        for unit in units.tolist()
    ]
    if not kinds or not len(targets):
        return []
    change_OT = _estimates(draft, layers, kinds, targets)
    units_O = np.array([kind.unit for kind in kinds])
    crowded_T = ~_has_place(draft, floor, targets, int(draft.grain.bytes_U[units_O[0]]))
    is_copy_O = np.array([not kind.is_move for kind in kinds])
    change_OT[draft.held_UN[units_O[:, None], targets]] = np.inf
    change_OT[is_copy_O[:, None] & crowded_T] = np.inf
    change_OT[is_copy_O & (draft.copies_U[units_O] >= draft.most_U[units_O])] = np.inf
    found: list[_Candidate] = []
    hosts = draft.layout.hosts
    # A place that is forbidden is forbidden to a copy and to a move from each host.
    for flat in _least(change_OT.ravel(), _TRIED + 2 * _SOURCES * len(forbidden)):
        option, t = divmod(flat, len(targets))
        kind, target = kinds[option], int(targets[t])
        if len(found) < _TRIED and change_OT[option, t] < 0 and (kind.unit, hosts[target].node_id) not in forbidden:
            found.append(_Candidate(kind.unit, kind.source, target, kind.layer, kind.is_move))
    return found


def _has_place(draft: Draft, floor: int, targets: IntArray, size: int) -> BoolArray:
    """Hosts that have room for so many bytes, or a unit with copies above the floor that could go; shape (T,)."""
    has_T: BoolArray = (draft.slots_free_N[targets] >= 1) & (draft.bytes_free_N[targets] >= size)
    if not has_T.all():
        spare_U = np.flatnonzero(draft.copies_U > floor)
        spare_N: BoolArray = np.any(draft.held_UN[spare_U], axis=0)
        has_T |= spare_N[targets]
    return has_T


def _least(values: FloatArray, num: int) -> list[int]:
    """Where the least so many values are, the least first; of equals, the first."""
    if num < len(values):
        among = np.flatnonzero(values <= np.partition(values, num - 1)[num - 1])
    else:
        among = np.arange(len(values))
    least: list[int] = among[np.argsort(values[among], kind="stable")][:num].tolist()
    return least


def _estimates(draft: Draft, layers: slice, kinds: Sequence[_Candidate], targets: IntArray) -> FloatArray:
    """Change of the smooth cost by each of these copies and moves to each target; O of them, shape (O, T).

    What must leave a full target is not counted here.
    """
    scale = max(float(draft.busy_LN[layers].max()), 1e-300)
    sum_lN = draft.sum_LN[layers] / scale
    powers_lN = _power(draft.busy_LN[layers] / scale)
    power_l = powers_lN.sum(axis=1)
    units_O = np.array([kind.unit for kind in kinds])
    is_move_O = np.array([kind.is_move for kind in kinds])
    work_lO = draft.work_LE[layers][:, units_O % draft.grain.num_experts] / scale
    copies_O = draft.copies_U[units_O]
    # A copy takes a part from each holder, a move all from one.
    less_ON = draft.held_UN[units_O] / (copies_O * (copies_O + 1))[:, None]
    less_ON[is_move_O] = 0.0
    moves = np.flatnonzero(is_move_O)
    less_ON[moves, [kinds[option].source for option in moves]] = 1 / copies_O[moves]
    less_ON /= draft.speed_N
    left_lON = sum_lN[:, None, :] - work_lO[:, :, None] * less_ON
    share_lO = work_lO / (copies_O + ~is_move_O)
    comes_lOT = share_lO[:, :, None] / draft.speed_N[targets]
    added_lOT = sum_lN[:, None, targets] + comes_lOT
    if draft.is_parallel:
        largest_lN = draft.largest_LN[layers] / scale
        left_lON = as_busy(left_lON, _largest_left(draft, layers, units_O, less_ON) / scale, draft.parallel_N)
        largest_lOT = np.maximum(largest_lN[:, None, targets], comes_lOT)
        added_lOT = as_busy(added_lOT, largest_lOT, draft.parallel_N[targets])
    relief_lO = (_power(left_lON) - powers_lN[:, None, :]).sum(axis=2)
    added_lOT = _power(added_lOT)
    added_lOT -= powers_lN[:, None, targets]
    added_lOT += (power_l[:, None] + relief_lO)[:, :, None]
    np.maximum(added_lOT, 0.0, out=added_lOT)
    difference_OT: FloatArray = (_root(added_lOT) - _root(power_l)[:, None, None]).sum(axis=0) * scale
    return difference_OT


def _largest_left(draft: Draft, layers: slice, units_O: IntArray, less_ON: FloatArray) -> FloatArray:
    """Work of each host on the unit it works longest on, once each option has taken its part away, shape (l, O, N)."""
    options_Q, hosts_Q = np.nonzero(less_ON)
    shares_QE = draft.shares(units_O[options_Q], hosts_Q)
    experts_Q = units_O[options_Q] % draft.grain.num_experts
    shares_QE[np.arange(len(experts_Q)), experts_Q] -= less_ON[options_Q, hosts_Q]
    largest_lON = np.repeat(draft.largest_LN[layers][:, None, :], len(units_O), axis=1)
    largest_lON[:, options_Q, hosts_Q] = largest_of(draft.work_LE[layers], shares_QE).T
    return largest_lON


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
) -> Iterator[Changes]:
    """Ways to carry the candidate out, each in an order that never leaves a unit unserved nor a host over-full."""
    unit, source, target = candidate.unit, candidate.source, candidate.target
    arrive = (unit, target, True)
    leave = ((unit, source, False),) if candidate.is_move else ()
    if draft.has_room(unit, target):
        yield (arrive, *leave)
        return
    for spare in spare_units(draft, target, unit, floor)[:_SPARED]:
        yield ((spare, target, False), arrive, *leave)
    if candidate.is_move:
        yield from _exchanges(draft, candidate, forbidden)


def _exchanges(draft: Draft, candidate: _Candidate, forbidden: Collection[tuple[int, NodeId]]) -> Iterator[Changes]:
    """The unit against a lighter one of the target that is served elsewhere meanwhile."""
    unit, source, target = candidate.unit, candidate.source, candidate.target
    hosts, size = draft.layout.hosts, draft.grain.bytes_U
    if not draft.open_N[source]:
        return
    others = np.flatnonzero(draft.held_UN[:, target] & ~draft.held_UN[:, source] & (draft.copies_U >= 2))
    lightest = others[np.argsort(draft.work_U[others] / draft.copies_U[others], kind="stable")]
    for other in lightest[:_EXCHANGED].tolist():
        fits_there = draft.slots_free_N[target] >= 0 and draft.bytes_free_N[target] + size[other] >= size[unit]
        fits_here = draft.slots_free_N[source] >= 0 and draft.bytes_free_N[source] + size[unit] >= size[other]
        if fits_there and fits_here and (other, hosts[source].node_id) not in forbidden:
            yield ((other, target, False), (unit, target, True), (unit, source, False), (other, source, True))
