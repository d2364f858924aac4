"""What comes before balance: every unit served, draining hosts emptied, every unit on two nodes where slots allow.

Changes a `Draft` and tells each change as an action. Evening out load is `balance_search`'s. Letters as in `layout`.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from cluster.ids import NodeId
from cluster.layout import IntArray, Layout
from cluster.layout_draft import Draft
from cluster.policy import Copy, Drop

Moves = list[Copy | Drop]
MIN_NODES = 2


@dataclass(slots=True)
class Allowance:
    """Bytes that may still be loaded in this round, and pairs (unit, node) that must not be used."""

    bytes_left: int
    forbidden: Collection[tuple[int, NodeId]] = ()


def copies_floor(layout: Layout, wanted: int = MIN_NODES) -> int:
    """Copies that every unit keeps: as many as wanted where the hosts that are not draining have the slots, else fewer.

    At least one.
    """
    grain = layout.grain
    largest = int(grain.bytes_U.max())
    room = [min(h.slots, h.memory_bytes // largest, grain.num_units) for h in layout.hosts if not h.draining]
    return max(1, min(wanted, sum(room) // grain.num_units))


def copies_wanted(min_copies: int, max_copies: int) -> int:
    """Copies that every unit should have where there is room: on two nodes, unless one is all that is allowed."""
    return min(max(MIN_NODES, min_copies), max_copies)


def check_copies(min_copies: int, max_copies: int) -> None:
    """Raises ValueError for limits that contradict each other."""
    if not 1 <= min_copies <= max_copies:
        raise ValueError(f"min_copies is {min_copies}, max_copies {max_copies}; they must be at least 1, ascending")


def trim(draft: Draft, most: int) -> Moves:
    """Drops copies beyond `most`, those on the busiest hosts first."""
    moves: Moves = []
    for unit in np.flatnonzero(draft.copies_U > most).tolist():
        while draft.copies_U[unit] > most:
            host = max(draft.holders(unit), key=lambda n: (float(draft.busy_LN[:, n].sum()), -n))
            moves.append(draft.drop(unit, host, f"{draft.grain.say(unit)} may have {most} copies"))
    return moves


def mend(draft: Draft, floor: int, allowance: Allowance) -> Moves:
    """All of it, the most urgent first. A unit that nobody serves is loaded whatever the allowance has left."""
    moves: Moves = []
    for unit in _hottest_first(draft, np.flatnonzero(draft.copies_U == 0)):
        moves += _one_more(draft, unit, 1, "nobody serves it", allowance.forbidden)
    allowance.bytes_left -= sum(move.num_bytes for move in moves if isinstance(move, Copy))
    for unit in _hottest_first(draft, np.flatnonzero(_open_copies(draft) < floor)):
        why = "it is on one node only" if _open_copies(draft)[unit] else "all its hosts are draining"
        # Two loads at most: the copy, and one other unit moved out of its way.
        if 2 * int(draft.grain.bytes_U.max()) <= allowance.bytes_left or _has_place(draft, unit, allowance):
            added = _one_more(draft, unit, floor, why, allowance.forbidden)
            allowance.bytes_left -= sum(move.num_bytes for move in added if isinstance(move, Copy))
            moves += added
    return moves + _evacuate(draft, floor)


def _hottest_first(draft: Draft, units: IntArray) -> list[int]:
    return sorted((int(u) for u in units), key=lambda u: (-int(draft.grain.bytes_U[u]), -float(draft.work(u).sum()), u))


def _open_copies(draft: Draft) -> IntArray:
    open_copies: IntArray = draft.held_UN[:, draft.open_N].sum(axis=1, dtype=np.int64)
    return open_copies


def _has_place(draft: Draft, unit: int, allowance: Allowance) -> bool:
    """True when a host can take the unit at once, and the allowance has its bytes."""
    if draft.grain.bytes_U[unit] > allowance.bytes_left:
        return False
    return any(draft.has_room(unit, n) for n in _allowed(draft, unit, allowance.forbidden))


def _allowed(draft: Draft, unit: int, forbidden: Collection[tuple[int, NodeId]]) -> list[int]:
    """Hosts that may get the unit, room or not; the least busy in its layers first."""
    hosts = draft.layout.hosts
    able = draft.open_N & ~draft.held_UN[unit]
    columns = [n for n in np.flatnonzero(able).tolist() if (unit, hosts[n].node_id) not in forbidden]
    busy_N = draft.busy_LN[draft.grain.layers(unit)].sum(axis=0)
    return sorted(columns, key=lambda n: (float(busy_N[n]), -int(draft.slots_free_N[n]), n))


def _one_more(draft: Draft, unit: int, floor: int, why: str, forbidden: Collection[tuple[int, NodeId]]) -> Moves:
    """One more copy of the unit: where there is room, else where a spare copy can go, else where another can move."""
    reason = f"{draft.grain.say(unit)}: {why}"
    columns = _allowed(draft, unit, forbidden)
    for host in columns:
        if draft.has_room(unit, host):
            return [draft.copy(unit, host, reason)]
    for host in columns:
        for spare in spare_units(draft, host, unit, floor)[:1]:
            return [draft.drop(spare, host, f"makes room: {reason}"), draft.copy(unit, host, reason)]
    for host in columns:
        for other in np.flatnonzero(draft.held_UN[:, host]).tolist():
            if draft.bytes_free_N[host] + draft.grain.bytes_U[other] < draft.grain.bytes_U[unit]:
                continue
            place = next((n for n in _allowed(draft, other, forbidden) if draft.has_room(other, n)), None)
            if place is not None:
                away = f"makes room: {reason}"
                moved: Moves = [draft.copy(other, place, away), draft.drop(other, host, away)]
                return [*moved, draft.copy(unit, host, reason)]
    return []


def spare_units(draft: Draft, host: int, unit: int, floor: int) -> list[int]:
    """Units that `unit` may replace on the host, `floor` other copies of them staying; those missed least first."""
    if draft.slots_free_N[host] < 0:
        return []
    held = np.flatnonzero(draft.held_UN[:, host] & (draft.copies_U > floor))
    fits = draft.bytes_free_N[host] + draft.grain.bytes_U[held] >= draft.grain.bytes_U[unit]
    held = held[fits & (held != unit)]
    copies = draft.copies_U[held]
    missed = draft.work_U[held] / (copies * (copies - 1))
    spare: list[int] = held[np.argsort(missed, kind="stable")].tolist()
    return spare


def _evacuate(draft: Draft, floor: int) -> Moves:
    """Drops what draining hosts hold and enough others do."""
    moves: Moves = []
    open_copies = _open_copies(draft)
    for host in np.flatnonzero(~draft.open_N).tolist():
        for unit in np.flatnonzero(draft.held_UN[:, host]).tolist():
            if open_copies[unit] >= floor:
                moves.append(draft.drop(unit, host, f"{draft.layout.hosts[host].node_id} is draining"))
    return moves
