"""What each of several small changes of a layout would cost, all of them tried at once on arrays.

Trying them one after another costs some numpy calls for each, and a decision tries hundreds. Which changes are worth
trying is `balance_search`'s. Letters as in `layout`; W ways to try, P pairs of a way and a unit that it changes, I
pairs of a way and a layer range that it touches, l layers of a range, Q pairs of one of these and a host whose work
changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.layout import FloatArray, IntArray, as_busy
from cluster.layout_draft import Draft, largest_of, smooth

Changes = tuple[tuple[int, int, bool], ...]
"""(unit, host, held), valid one after another."""


def costs_after(draft: Draft, ways: Sequence[Changes], before_L: FloatArray) -> FloatArray:
    """`smooth_cost` of the draft as if one of the ways had been gone, for each of them, shape (W,).

    `before_L` is `smooth_costs` of now: only ranges that a way touches are computed again.
    """
    costs_W = np.full(len(ways), float(before_L.sum()))
    if not ways:
        return costs_W
    pairs, shares_PN = _share_changes(draft, ways)
    for touched in _touched(draft, pairs):
        layers_Il = np.array(touched.starts)[:, None] + np.arange(touched.num_layers)
        sum_IlN = draft.sum_LN[layers_Il]
        turns = [tuple(np.array(column) for column in zip(*turn, strict=True)) for turn in touched.turns]
        for items, rows, experts in turns:
            work_Pl = draft.work_LE[layers_Il[items], experts[:, None]]
            sum_IlN[items] += work_Pl[:, :, None] * shares_PN[rows][:, None, :]
        busy_IlN = sum_IlN
        if draft.is_parallel:
            busy_IlN = as_busy(sum_IlN, _largest(draft, layers_Il, turns, shares_PN), draft.parallel_N)
        changes_I = smooth(busy_IlN).sum(axis=1) - before_L[layers_Il].sum(axis=1)
        np.add.at(costs_W, touched.ways, changes_I)
    return costs_W


def _largest(
    draft: Draft, layers_Il: IntArray, turns: Sequence[tuple[IntArray, ...]], shares_PN: FloatArray
) -> FloatArray:
    """Work of each host on the unit it works longest on, after each of these ways, shape (I, l, N)."""
    changed_IN = np.zeros((len(layers_Il), len(draft.speed_N)), np.bool_)
    for items, rows, _ in turns:
        changed_IN[items] |= shares_PN[rows] != 0
    items_Q, hosts_Q = np.nonzero(changed_IN)
    firsts_I = np.searchsorted(draft.grain.bounds, layers_Il[:, 0], side="right") - 1
    shares_QE = draft.shares(firsts_I[items_Q] * draft.grain.num_experts, hosts_Q)
    for items, rows, experts in turns:
        row_I = np.full(len(layers_Il), -1)
        expert_I = row_I.copy()
        row_I[items], expert_I[items] = rows, experts
        pairs = np.flatnonzero(row_I[items_Q] >= 0)
        which = items_Q[pairs]
        shares_QE[pairs, expert_I[which]] += shares_PN[row_I[which], hosts_Q[pairs]]
    largest_IlN = draft.largest_LN[layers_Il]
    largest_IlN[items_Q, :, hosts_Q] = largest_of(draft.work_LE[layers_Il[items_Q]], shares_QE)
    return largest_IlN


def _share_changes(draft: Draft, ways: Sequence[Changes]) -> tuple[list[tuple[int, int]], FloatArray]:
    """Each (way, unit); by how much longer each host works for a second of that unit's work, after it, shape (P, N)."""
    pairs: dict[tuple[int, int], int] = {}
    rows: list[int] = []
    hosts: list[int] = []
    flags: list[bool] = []
    for way, changes in enumerate(ways):
        for unit, host, held in changes:
            rows.append(pairs.setdefault((way, unit), len(pairs)))
            hosts.append(host)
            flags.append(held)
    held_PN = draft.held_UN[[unit for _, unit in pairs]].astype(np.float64)
    before_PN = held_PN / np.maximum(held_PN.sum(axis=1, keepdims=True), 1.0)
    held_PN[rows, hosts] = flags
    shares_PN: FloatArray = held_PN / np.maximum(held_PN.sum(axis=1, keepdims=True), 1.0)
    shares_PN -= before_PN
    shares_PN /= draft.speed_N
    return list(pairs), shares_PN


@dataclass(slots=True)
class _Touched:
    """Pairs of a way and a range, of all ranges with so many layers: first layers, ways.

    `turns`: (pair of these, row in P, expert) of the first unit that a way changes there, then of the second, ...
    """

    num_layers: int
    starts: list[int] = field(default_factory=list)
    ways: list[int] = field(default_factory=list)
    turns: list[list[tuple[int, int, int]]] = field(default_factory=list)


def _touched(draft: Draft, pairs: Sequence[tuple[int, int]]) -> list[_Touched]:
    bounds, num_experts = draft.grain.bounds, draft.grain.num_experts
    of_length: dict[int, _Touched] = {}
    known: dict[tuple[int, int], tuple[int, int]] = {}
    for row, (way, unit) in enumerate(pairs):
        which, expert = divmod(unit, num_experts)
        length = bounds[which + 1] - bounds[which]
        touched = of_length.get(length)
        if touched is None:
            touched = of_length[length] = _Touched(length)
        item, turn = known.get((way, which), (len(touched.ways), 0))
        known[way, which] = item, turn + 1
        if turn == 0:
            touched.starts.append(bounds[which])
            touched.ways.append(way)
        if turn == len(touched.turns):
            touched.turns.append([])
        touched.turns[turn].append((item, row, expert))
    return list(of_length.values())
