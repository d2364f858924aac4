"""How many tokens each expert of each layer got: totals since start, and a bounded recent window.

Counted by the coordinator from its dispatch plans. The layer axis is kept: summed over layers, imbalance
cancels out. L layers, E experts, W slots of the window.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class LoadWindow:
    """Tokens routed per (layer, expert) in about the last `window_s` seconds.

    A ring of `num_slots` equal slots, so the oldest slot leaves as a whole: the window covers between
    window_s * (1 - 1 / num_slots) and window_s seconds. Memory is fixed.
    """

    def __init__(self, num_layers: int, num_experts: int, *, window_s: float = 60.0, num_slots: int = 12) -> None:
        _check_shape(num_layers, num_experts)
        if num_slots < 1 or not window_s > 0:
            raise ValueError(f"window_s is {window_s} and num_slots {num_slots}, but both must be positive")
        self._slots_WLE = [_nothing(num_layers, num_experts) for _ in range(num_slots)]
        self._slot_s = window_s / num_slots
        self._current = 0
        self._slot_number: int | None = None
        self._began_s = self._now_s = 0.0

    def add(self, layer: int, counts_E: Sequence[int]) -> None:
        """Count one layer's dispatch: tokens per expert."""
        _count(self._slots_WLE[self._current][layer], counts_E)

    def roll(self, now_s: float) -> None:
        """Tell the time, of any clock; slots that have left the window are emptied."""
        number = int(now_s // self._slot_s)
        if self._slot_number is None:
            self._slot_number, self._began_s, self._now_s = number, now_s, now_s
        for _ in range(min(number - self._slot_number, len(self._slots_WLE))):
            self._current = (self._current + 1) % len(self._slots_WLE)
            self._slots_WLE[self._current] = [[0] * len(row_E) for row_E in self._slots_WLE[self._current]]
        self._slot_number = max(number, self._slot_number)
        self._now_s = max(self._now_s, now_s)

    @property
    def covered_s(self) -> float:
        """For how long, until it was last told the time, the window has counted: its length once it is full."""
        if self._slot_number is None:
            return 0.0
        oldest_s = (self._slot_number + 1 - len(self._slots_WLE)) * self._slot_s
        return self._now_s - max(self._began_s, oldest_s)

    @property
    def load(self) -> IntArray:
        """Tokens per (layer, expert) in the window, shape (L, E); a fresh array."""
        load_LE: IntArray = np.array(self._slots_WLE, np.int64).sum(axis=0)
        return load_LE


class LoadCounter:
    """Tokens routed per (layer, expert) since start, with the recent `window` kept alongside.

    `divisible_rows` tells from how many rows of a batch on an expert's replicas would share them, asked once a step.
    `batches` were counted since start: a step makes one, or several microbatches.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        window: LoadWindow | None = None,
        divisible_rows: Callable[[], float] = lambda: math.inf,
    ) -> None:
        _check_shape(num_layers, num_experts)
        self.window = LoadWindow(num_layers, num_experts) if window is None else window
        self.batches = 0
        self._total_LE = _nothing(num_layers, num_experts)
        self._divisible_LE = _nothing(num_layers, num_experts)
        self._ask_divisible_rows = divisible_rows
        self._divisible_rows = math.inf

    def add(self, layer: int, counts_E: Sequence[int]) -> None:
        """Count one layer's dispatch: tokens per expert."""
        _count(self._total_LE[layer], counts_E)
        self.window.add(layer, counts_E)
        if layer == 0:
            self.batches += 1
        if max(counts_E) >= self._divisible_rows:
            _count(self._divisible_LE[layer], [num if num >= self._divisible_rows else 0 for num in counts_E])

    def roll(self, now_s: float) -> None:
        """Tell the window the time, once a step."""
        self.window.roll(now_s)
        self._divisible_rows = self._ask_divisible_rows()

    @property
    def total(self) -> IntArray:
        """Tokens per (layer, expert) since start, shape (L, E); a fresh array."""
        return np.array(self._total_LE, np.int64)

    @property
    def divisible(self) -> IntArray:
        """The part of `total` from batches so large that an expert's replicas would share them, shape (L, E)."""
        return np.array(self._divisible_LE, np.int64)


def _nothing(num_layers: int, num_experts: int) -> list[list[int]]:
    return [[0] * num_experts for _ in range(num_layers)]


def _count(totals_E: list[int], counts_E: Sequence[int]) -> None:
    """Plain integers: this is done for every layer of every step, and numpy would first make an array of a few."""
    if len(counts_E) != len(totals_E):
        raise ValueError(f"counts of {len(counts_E)} experts, expected {len(totals_E)}")
    for expert, count in enumerate(counts_E):
        totals_E[expert] += count


def balancedness(load_LE: npt.ArrayLike) -> FloatArray:
    """Mean load / max load of each layer, shape (L,): 1.0 is perfect, 1/E is everything at one expert.

    A layer without load is balanced: 1.0.
    """
    loads = np.asarray(load_LE, np.float64)
    if loads.ndim != 2 or loads.shape[1] == 0 or (loads < 0).any():
        raise ValueError(f"load_LE has shape {loads.shape}; it must be layers by experts, nowhere negative")
    largest_L: FloatArray = loads.max(axis=1)
    balanced_L = np.ones_like(largest_L)
    np.divide(loads.mean(axis=1), largest_L, out=balanced_L, where=largest_L > 0)
    return balanced_L


def _check_shape(num_layers: int, num_experts: int) -> None:
    if num_layers < 1 or num_experts < 1:
        raise ValueError(f"num_layers is {num_layers} and num_experts {num_experts}, but both must be at least 1")
