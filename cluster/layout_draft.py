"""A layout that is being changed step by step, with every host's load kept up to date: the policies' scratch paper.

It keeps the rules (no second copy on a host, slots, memory) and can take back what it did. What to change is not
decided here. Letters as in `layout`.
"""

from collections.abc import Sequence

import numpy as np

from cluster.layout import FloatArray, IntArray, Layout, as_busy, largest_works, parallelisms, speeds, work_sums
from cluster.policy import Copy, Drop

MANY_COPIES = 1 << 30
"""No limit."""
_ALL = slice(None)
STEEPNESS = 8
"""Power of the smooth maximum: high enough that the busiest host rules, low enough that the second busiest counts."""


_NOTHING = 1e-12
"""A share of a host's time below which it is rounding."""


class Draft:
    """Copies and drops on a private copy of `layout`. Without `work_LE` nothing is known about loads.

    A search adds no copy for balance to a unit that has `most_U` copies, `max_copies` unless somebody lowers them; a
    move may have one more for its while.
    """

    def __init__(self, layout: Layout, work_LE: FloatArray | None, *, max_copies: int = MANY_COPIES) -> None:
        grain = layout.grain
        self.layout = layout
        self.grain = grain
        self.most_U = np.full(grain.num_units, max_copies, np.int64)
        self.held_UN = layout.held_UN.copy()
        self.copies_U = layout.copies_U.copy()
        self.slots_free_N = layout.slots_free_N.copy()
        self.bytes_free_N = layout.bytes_free_N.copy()
        self.speed_N = speeds(layout.hosts)
        self.open_N = np.array([not host.draining for host in layout.hosts], np.bool_)
        self.work_LE = np.zeros((grain.num_layers, grain.num_experts)) if work_LE is None else work_LE
        self.work_U: FloatArray = np.add.reduceat(self.work_LE, grain.bounds[:-1], axis=0).ravel()
        self.parallel_N = parallelisms(layout.hosts)
        self.is_parallel = bool((self.parallel_N > 1).any())
        self.capacity = float((self.speed_N * self.parallel_N).sum())
        self.sum_LN = work_sums(grain, self.held_UN, self.copies_U, self.speed_N, self.work_LE)
        self.largest_LN = self.busy_LN = self.sum_LN
        if self.is_parallel:
            self.largest_LN = largest_works(grain, self.held_UN, self.copies_U, self.speed_N, self.work_LE)
            self.busy_LN = as_busy(self.sum_LN, self.largest_LN, self.parallel_N)

    def work(self, unit: int) -> FloatArray:
        """Work of a unit in each of its layers."""
        return self.work_LE[self.grain.layers(unit), unit % self.grain.num_experts]

    def holders(self, unit: int) -> list[int]:
        """Hosts (columns) that hold the unit."""
        return [int(host) for host in np.flatnonzero(self.held_UN[unit])]

    def has_room(self, unit: int, host: int) -> bool:
        """True when the host could load the unit now, and may."""
        return bool(
            self.open_N[host]
            and self.slots_free_N[host] >= 1
            and self.bytes_free_N[host] >= self.grain.bytes_U[unit]
            and not self.held_UN[unit, host]
        )

    def copy(self, unit: int, host: int, reason: str) -> Copy:
        """Put the unit on the host; it must have room. The source is the least busy holder, or disk."""
        assert self.has_room(unit, host), f"{self.layout.hosts[host].node_id} has no room for unit {unit}"
        holders = np.flatnonzero(self.held_UN[unit])
        source = None
        if len(holders):
            source = int(holders[self.busy_LN[self.grain.layers(unit)][:, holders].sum(axis=0).argmin()])
        self._set(unit, host, held=True)
        return Copy(
            unit=unit,
            node_id=self.layout.hosts[host].node_id,
            source=None if source is None else self.layout.hosts[source].node_id,
            num_bytes=int(self.grain.bytes_U[unit]),
            reason=reason,
        )

    def drop(self, unit: int, host: int, reason: str) -> Drop:
        """Take the unit from the host."""
        assert self.held_UN[unit, host], f"{self.layout.hosts[host].node_id} does not hold unit {unit}"
        self._set(unit, host, held=False)
        return Drop(unit=unit, node_id=self.layout.hosts[host].node_id, reason=reason)

    def redo(self, actions: Sequence[tuple[int, int, bool]]) -> None:
        """(unit, host, held) one after another, unchecked."""
        for unit, host, held in actions:
            self._set(unit, host, held=held)

    @property
    def loads(self) -> tuple[FloatArray, ...]:
        """Copies of what `undo` has to bring back."""
        return tuple(array.copy() for array in self._loads)

    def undo(self, actions: Sequence[tuple[int, int, bool]], before: tuple[FloatArray, ...]) -> None:
        """Takes back what `redo` did last, to the last bit: `before` is `loads` from before it."""
        for unit, host, held in reversed(actions):
            self._count(unit, host, held=not held)
        for array, was in zip(self._loads, before, strict=True):
            array[:] = was

    def even(self, layers: slice | int = _ALL) -> FloatArray:
        """Share of its time that each of these layers would cost if every host worked as long as any other."""
        even: FloatArray = (self.sum_LN[layers] @ self.speed_N) / self.capacity
        return even

    def smooth_costs(self) -> FloatArray:
        """Of each layer, like its busiest host's share, but the busiest hosts count, not only the one; shape (L,)."""
        return smooth(self.busy_LN)

    def smooth_cost(self) -> float:
        """Like `critical_share`, of `smooth_costs`."""
        return float(self.smooth_costs().sum())

    def _set(self, unit: int, host: int, *, held: bool) -> None:
        before_N = self._shares(unit)
        self._count(unit, host, held=held)
        change_N, layers = self._shares(unit) - before_N, self.grain.layers(unit)
        self.sum_LN[layers] += self.work(unit)[:, None] * change_N
        if self.is_parallel:
            hosts = np.flatnonzero(change_N)
            self.largest_LN[layers, hosts] = self._largest(unit, hosts)
            self.busy_LN[layers] = as_busy(self.sum_LN[layers], self.largest_LN[layers], self.parallel_N)

    @property
    def _loads(self) -> tuple[FloatArray, ...]:
        return (self.sum_LN, self.largest_LN, self.busy_LN) if self.is_parallel else (self.sum_LN,)

    def _largest(self, unit: int, hosts: IntArray) -> FloatArray:
        """Work of these hosts on the unit of the range of `unit` that they work longest on, shape (layers, hosts)."""
        largest: FloatArray = largest_of(self.work_LE[self.grain.layers(unit)], self.shares(unit, hosts)).T
        return largest

    def shares(self, units: IntArray | int, hosts: IntArray) -> FloatArray:
        """How long each host works for a second of each expert's work, in the layer range of the unit that is given
        for it (or for all), shape (hosts, E).
        """
        num_experts = self.grain.num_experts
        firsts = np.broadcast_to(np.asarray(units) // num_experts * num_experts, hosts.shape)
        units_XE = firsts[:, None] + np.arange(num_experts)
        held_XE = self.held_UN[units_XE, hosts[:, None]]
        shares_XE: FloatArray = held_XE / (np.maximum(self.copies_U[units_XE], 1) * self.speed_N[hosts, None])
        return shares_XE

    def _count(self, unit: int, host: int, *, held: bool) -> None:
        sign = 1 if held else -1
        self.held_UN[unit, host] = held
        self.copies_U[unit] += sign
        self.slots_free_N[host] -= sign
        self.bytes_free_N[host] -= sign * self.grain.bytes_U[unit]

    def _shares(self, unit: int) -> FloatArray:
        """How long each host works for one second of the unit's work."""
        shares_N: FloatArray = self.held_UN[unit] / (max(int(self.copies_U[unit]), 1) * self.speed_N)
        return shares_N


def largest_of(work_XlE: FloatArray, shares_XE: FloatArray) -> FloatArray:
    """The largest of the experts' works, times these shares, shape (X, l)."""
    largest_Xl: FloatArray = (work_XlE * shares_XE[:, None, :]).max(axis=-1)
    return largest_Xl


def smooth(busy_XN: FloatArray) -> FloatArray:
    """The norm of each row, of STEEPNESS: squared three times, many times faster than `**`."""
    largest_X = busy_XN.max(axis=-1, initial=_NOTHING)
    power_XN = busy_XN / largest_X[..., None]
    for _ in range(3):
        np.multiply(power_XN, power_XN, out=power_XN)
    root_X: FloatArray = power_XN.sum(axis=-1)
    for _ in range(3):
        np.sqrt(root_X, out=root_X)
    smooth_X: FloatArray = largest_X * root_X
    return smooth_X
