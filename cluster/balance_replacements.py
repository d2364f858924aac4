"""The best copy of a unit in the place of another unit's spare copy, all of them compared at once on arrays.

`balance_search` estimates copies without what must leave a full host for them. Where every host is full, one such
replacement often does what takes several steps otherwise, and may be the only step that gains. Letters as in `layout`;
E experts of one layer range, l its layers; U units that may come, S spare ones that may go.
"""

from collections.abc import Collection

import numpy as np

from cluster.ids import NodeId
from cluster.layout import FloatArray
from cluster.layout_draft import STEEPNESS, Draft

MOST_NUMBERS = 1 << 14
"""U x S x l x N up to which they are looked at, so that a decision's time is bounded."""
ROUNDING = 1e-9
"""Costs that differ by less, relative to all, are alike."""


def best_replacement(
    draft: Draft, floor: int, forbidden: Collection[tuple[int, NodeId]], layers: slice
) -> tuple[int, int, int] | None:
    """(unit that comes, unit of the same range that goes, host) with the least cost for these layers, one range.

    What goes keeps `floor` other copies. None where there is none, where there are too many to look at, and where hosts
    work on several units at once: what they wait for then does not add up.
    """
    if draft.is_parallel:
        return None
    first = draft.grain.unit(layers.start, 0)
    held_EN = draft.held_UN[first : first + draft.grain.num_experts]
    copies_E = draft.copies_U[first : first + draft.grain.num_experts]
    may_leave_EN = held_EN & (copies_E > floor)[:, None]
    may_leave_EN &= draft.open_N & (draft.slots_free_N >= 0) & (draft.bytes_free_N >= 0)
    most_E = draft.most_U[first : first + draft.grain.num_experts]
    may_come_EN = ~held_EN & ((copies_E >= 1) & (copies_E < most_E))[:, None]
    hosts = draft.layout.hosts
    for unit, node_id in forbidden:
        if first <= unit < first + len(held_EN):
            may_come_EN[unit - first] &= np.array([host.node_id != node_id for host in hosts])
    come_U, go_S = np.flatnonzero(may_come_EN.any(axis=1)), np.flatnonzero(may_leave_EN.any(axis=1))
    if len(come_U) * len(go_S) * (layers.stop - layers.start) * len(hosts) > MOST_NUMBERS:
        return None
    may_USN = may_come_EN[come_U][:, None, :] & may_leave_EN[go_S][None, :, :]
    if not may_USN.any():
        return None
    costs_USN = np.where(may_USN, _costs(draft, layers, first, come_U, go_S), np.inf)
    # Of those that differ by rounding only, the first.
    alike_USN = costs_USN <= costs_USN.min() * (1 + ROUNDING)
    come, go, host = np.unravel_index(int(np.argmax(alike_USN)), alike_USN.shape)
    return first + int(come_U[come]), first + int(go_S[go]), int(host)


def _costs(draft: Draft, layers: slice, first: int, come_U: np.ndarray, go_S: np.ndarray) -> FloatArray:
    """Smooth cost of these layers with the copy of U in the place of S on host N, shape (U, S, N)."""
    busy_lN, work_lE = draft.busy_LN[layers], draft.work_LE[layers]
    scale = max(float(busy_lN.max()), 1e-300)
    work_Ul1, work_Sl1 = (work_lE[:, each].T[:, :, None] / scale for each in (come_U, go_S))
    held_UN, held_SN = (draft.held_UN[first + each][:, None, :] / draft.speed_N for each in (come_U, go_S))
    copies_U11, copies_S11 = (draft.copies_U[first + each][:, None, None] for each in (come_U, go_S))
    # Every other holder gives up a part of what comes, and takes over a part of what goes.
    less_UlN = work_Ul1 * (held_UN / (copies_U11 * (copies_U11 + 1)))
    more_SlN = work_Sl1 * (held_SN / (copies_S11 * np.maximum(copies_S11 - 1, 1)))
    others_USlN = _to_power((busy_lN / scale - less_UlN)[:, None] + more_SlN)
    comes_UlN = work_Ul1 / (copies_U11 + 1) / draft.speed_N
    goes_SlN = work_Sl1 / copies_S11 / draft.speed_N
    here_USlN = _to_power((busy_lN / scale + comes_UlN)[:, None] - goes_SlN)
    here_USlN -= others_USlN
    here_USlN += others_USlN.sum(axis=3, keepdims=True)
    np.maximum(here_USlN, 0.0, out=here_USlN)
    costs_USN: FloatArray = _to_root(here_USlN).sum(axis=2) * scale
    return costs_USN


def _to_power(x: FloatArray) -> FloatArray:
    """x, in its place, to the power of `STEEPNESS`, which is 8; many times faster than `**`."""
    for _ in range(STEEPNESS.bit_length() - 1):
        np.multiply(x, x, out=x)
    return x


def _to_root(x: FloatArray) -> FloatArray:
    for _ in range(STEEPNESS.bit_length() - 1):
        np.sqrt(x, out=x)
    return x
