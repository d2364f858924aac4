"""Which host holds which part of which expert, as arrays: what the balancing policies start from and propose.

A part, called unit, is one expert in one range of layers (a whole column where there is one range). L layers, E
experts, G layer ranges, U = G·E units (unit = range · E + expert), N hosts. Deciding anything is not done here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cluster.ids import ExpertId, NodeId

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Grain:
    """How a model is cut into units: `bounds` are the first layers of the ranges, and at the end the number of layers.

    (0, 32) is whole columns, (0, 16, 32) halves, range(33) single layers. `layer_bytes` is one expert in one layer.
    """

    num_experts: int
    bounds: tuple[int, ...]
    layer_bytes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", tuple(self.bounds))
        ascending = all(low < high for low, high in zip(self.bounds, self.bounds[1:], strict=False))
        if len(self.bounds) < 2 or self.bounds[0] != 0 or not ascending:
            raise ValueError(f"bounds are {self.bounds}; they must ascend from 0 to the number of layers")
        if self.num_experts < 1 or self.layer_bytes < 1:
            raise ValueError(
                f"num_experts is {self.num_experts} and layer_bytes {self.layer_bytes}, but both must be at least 1"
            )

    @classmethod
    def even(cls, num_layers: int, num_experts: int, *, num_ranges: int = 1, layer_bytes: int = 1) -> "Grain":
        """Ranges of about equal length."""
        if not 1 <= num_ranges <= num_layers:
            raise ValueError(f"num_ranges is {num_ranges}, but it must be 1 to the {num_layers} layers")
        bounds = tuple(round(i * num_layers / num_ranges) for i in range(num_ranges + 1))
        return cls(num_experts=num_experts, bounds=bounds, layer_bytes=layer_bytes)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.bounds[-1]

    @property
    def num_ranges(self) -> int:
        """G."""
        return len(self.bounds) - 1

    @property
    def num_units(self) -> int:
        """U."""
        return self.num_ranges * self.num_experts

    @cached_property
    def bytes_U(self) -> IntArray:
        """Size of each unit."""
        return np.repeat(np.diff(self.bounds), self.num_experts).astype(np.int64) * self.layer_bytes

    def layers(self, unit: int) -> slice:
        """The layers of a unit."""
        which = unit // self.num_experts
        return slice(self.bounds[which], self.bounds[which + 1])

    def expert(self, unit: int) -> ExpertId:
        """The expert of a unit."""
        return ExpertId(unit % self.num_experts)

    def unit(self, layer: int, expert: int) -> int:
        """The unit that has this expert in this layer."""
        which = int(np.searchsorted(self.bounds, layer, side="right")) - 1
        return which * self.num_experts + expert

    def say(self, unit: int) -> str:
        """`expert 3`, or `expert 3 in layers 8-15`."""
        layers = self.layers(unit)
        where = "" if self.num_ranges == 1 else f" in layers {layers.start}-{layers.stop - 1}"
        return f"expert {self.expert(unit)}{where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What a machine offers: units it may hold, memory for them, speed relative to the host work is measured on.

    It works on `parallelism` units at once (its GPUs; or processors, where each unit has a process), on one of them
    never with more than one. A `draining` host gives up what it has and gets nothing new.
    """

    node_id: NodeId
    slots: int
    memory_bytes: int
    speed: float = 1.0
    draining: bool = False
    parallelism: int = 1

    def __post_init__(self) -> None:
        if self.slots < 0 or self.memory_bytes < 0 or not self.speed > 0 or self.parallelism < 1:
            raise ValueError(
                f"{self.node_id} has {self.slots} slots, {self.memory_bytes} bytes, speed {self.speed}, parallelism "
                f"{self.parallelism}: the first two must be at least 0, speed above 0, parallelism at least 1"
            )


@dataclass(frozen=True, eq=False)
class Layout:
    """`held_UN[unit, host]` is True where `hosts[host]` holds the unit: by its form at most one copy on a host."""

    grain: Grain
    hosts: tuple[Host, ...]
    held_UN: BoolArray

    def __post_init__(self) -> None:
        held = np.array(self.held_UN, np.bool_)
        shape = (self.grain.num_units, len(self.hosts))
        if held.shape != shape:
            raise ValueError(f"held_UN has shape {held.shape}, but there are {shape[0]} units and {shape[1]} hosts")
        if len({host.node_id for host in self.hosts}) != len(self.hosts):
            raise ValueError("two hosts have the same node_id")
        held.setflags(write=False)
        object.__setattr__(self, "held_UN", held)

    @classmethod
    def empty(cls, grain: Grain, hosts: Sequence[Host]) -> "Layout":
        """Nobody holds anything."""
        return cls(grain, tuple(hosts), np.zeros((grain.num_units, len(hosts)), np.bool_))

    @cached_property
    def copies_U(self) -> IntArray:
        """Hosts that hold each unit."""
        copies: IntArray = self.held_UN.sum(axis=1, dtype=np.int64)
        return copies

    @cached_property
    def slots_free_N(self) -> IntArray:
        """Units that each host may still take; negative where it has too many."""
        free: IntArray = np.array([host.slots for host in self.hosts], np.int64) - self.held_UN.sum(axis=0)
        return free

    @cached_property
    def bytes_free_N(self) -> IntArray:
        """Memory left on each host; negative where there is too little."""
        free: IntArray = np.array([h.memory_bytes for h in self.hosts], np.int64) - self.grain.bytes_U @ self.held_UN
        return free

    def on(self, hosts: Sequence[Host]) -> "Layout":
        """The same on these hosts: what was on others is gone, new ones are empty."""
        columns = {host.node_id: column for column, host in enumerate(self.hosts)}
        held = np.zeros((self.grain.num_units, len(hosts)), np.bool_)
        for column, host in enumerate(hosts):
            if host.node_id in columns:
                held[:, column] = self.held_UN[:, columns[host.node_id]]
        return Layout(self.grain, tuple(hosts), held)

    def busy_LN(self, work_LE: FloatArray) -> FloatArray:
        """Share of its time that each host works in each layer, if copies of a unit share its work evenly.

        `work_LE` is in seconds of a host of speed 1 per second. Work of a unit that nobody holds is not in it.
        """
        speed_N, parallel_N = speeds(self.hosts), parallelisms(self.hosts)
        sum_LN = work_sums(self.grain, self.held_UN, self.copies_U, speed_N, work_LE)
        if (parallel_N == 1).all():
            return sum_LN
        return as_busy(sum_LN, largest_works(self.grain, self.held_UN, self.copies_U, speed_N, work_LE), parallel_N)


def speeds(hosts: Sequence[Host]) -> FloatArray:
    """Speed of each host, on one unit, shape (N,)."""
    return np.array([host.speed for host in hosts], np.float64)


def parallelisms(hosts: Sequence[Host]) -> IntArray:
    """Units that each host works on at once, shape (N,)."""
    return np.array([host.parallelism for host in hosts], np.int64)


def as_busy(sum_XN: FloatArray, largest_XN: FloatArray, parallel_N: IntArray) -> FloatArray:
    """How long hosts work that have so much in all, and so much with one unit: no unit is worked on by two at once."""
    busy_XN: FloatArray = np.maximum(sum_XN / parallel_N, largest_XN)
    return busy_XN


def work_sums(
    grain: Grain, held_UN: BoolArray, copies_U: IntArray, speed_N: FloatArray, work_LE: FloatArray
) -> FloatArray:
    """How long each host works on its units in each layer, one after another, shape (L, N)."""
    sum_LN = np.empty((grain.num_layers, held_UN.shape[1]))
    for which in range(grain.num_ranges):
        units = slice(which * grain.num_experts, (which + 1) * grain.num_experts)
        layers = slice(grain.bounds[which], grain.bounds[which + 1])
        share_lE = work_LE[layers] / np.maximum(copies_U[units], 1)
        sum_LN[layers] = share_lE @ held_UN[units].astype(np.float64)
    sum_LN /= speed_N
    return sum_LN


def largest_works(
    grain: Grain, held_UN: BoolArray, copies_U: IntArray, speed_N: FloatArray, work_LE: FloatArray
) -> FloatArray:
    """How long each host works on the one of its units that it works longest on, in each layer, shape (L, N)."""
    largest_LN = np.zeros((grain.num_layers, held_UN.shape[1]))
    for which in range(grain.num_ranges):
        largest_lN = largest_LN[grain.bounds[which] : grain.bounds[which + 1]]
        for unit in range(which * grain.num_experts, (which + 1) * grain.num_experts):
            share_l = work_LE[grain.layers(unit), unit % grain.num_experts] / max(int(copies_U[unit]), 1)
            np.maximum(largest_lN, share_l[:, None] * held_UN[unit], out=largest_lN)
    largest_LN /= speed_N
    return largest_LN


def critical_share(busy_LN: FloatArray) -> float:
    """Share of the time that steps wait for the busiest host of each layer: Σ over layers of the largest share.

    Layers follow each other and each waits for its slowest host, so this, not any host's own sum, is what a step
    costs. 1.0 is all that a coordinator that does one step at a time can have.
    """
    return float(busy_LN.max(axis=1, initial=0.0).sum())
