"""Which row counts give the same bits, and how to cut any number of rows into those counts.

A matrix product may round a row differently when its neighbours are more or fewer: libraries choose their
inner loops by row count and by thread count. This file finds by experiment, at start, a set of row counts
that agree bit for bit (a *row class*), and runs row-wise functions on those counts only, so that a row's
result does not depend on its company. Which functions are row-wise, and what they compute, is left to their
owners.

Tensor suffixes: M rows of one call, I and O input and output width, P rows of the calibration pool.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RowFunction = Callable[[Tensor], Tensor]

# Dense where prefill's rows per expert lie: each bucket that is missing is arithmetic on padding.
ROW_CANDIDATES = (
    *(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32),
    *range(40, 129, 8),
    *range(144, 257, 16),
    *(320, 384, 448, 512),
)
# Each is a CUDA graph per layer, up to 256; below the ridge of a GPU padding costs next to nothing.
CUDA_ROW_CANDIDATES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_POOL_ROWS = {"cpu": 4, "cuda": 16}
_MARKED_AT_ONCE = 16  # rows, of which there is a copy then
_ALIGNMENT_BYTES = 64
# Reading the weights once costs about as much as the arithmetic of this many rows.
_CALL_COST_ROWS = {"cpu": 16, "cuda": 256}
_ALWAYS_CALIBRATED = 32
_CALIBRATION_FLOPS = {"cpu": 1.3e10, "cuda": 8e12}


@dataclass(frozen=True, slots=True)
class RowClass:
    """Row counts, ascending, that give every row the same bits whatever its position and neighbours.

    >>> list(RowClass((4, 8)).pieces(21))  # (start, rows, bucket): the last piece is padded from 5 to 8
    [(0, 8, 8), (8, 8, 8), (16, 5, 8)]
    """

    buckets: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.buckets or self.buckets[0] < 1 or list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"a row class needs ascending positive row counts, got {self.buckets}")

    def bucket(self, rows: int) -> int:
        """The smallest bucket that holds `rows`, or the largest bucket when none does."""
        return self.buckets[min(bisect_left(self.buckets, rows), len(self.buckets) - 1)]

    def pieces(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """Cut `rows` into `(start, rows of the piece, bucket to pad it to)`."""
        for start in range(0, rows, self.buckets[-1]):
            count = min(self.buckets[-1], rows - start)
            yield start, count, self.bucket(count)

    def cost(self, rows: int, call_rows: int) -> int:
        """Work for `rows`, in rows, each call's reading of the weights counted as `call_rows`."""
        return sum(call_rows + bucket for _, _, bucket in self.pieces(rows))

    def __str__(self) -> str:
        return ".".join(map(str, self.buckets))


def row_candidates(flops_per_row: float, device: torch.device | str = "cpu") -> tuple[int, ...]:
    """The row counts worth trying for a product of this size, so that calibration takes a fraction of a second.

    Counts up to 32 are always tried; larger ones while all together stay under 13 GFLOP, on a GPU 8 TFLOP. A
    count left out only means that more rows are cut into more calls.
    """
    kind = torch.device(device).type
    most = _CALIBRATION_FLOPS[kind]
    chosen: list[int] = []
    total = 0.0
    for rows in CUDA_ROW_CANDIDATES if kind == "cuda" else ROW_CANDIDATES:
        total += rows * len(_shifts(rows, _POOL_ROWS[kind])) * flops_per_row
        if rows > _ALWAYS_CALIBRATED and total > most:
            break
        chosen.append(rows)
    return tuple(chosen)


@torch.no_grad()
def calibrate_rows(
    fn: RowFunction,
    width: int,
    candidates: Sequence[int] = ROW_CANDIDATES,
    *,
    anchor: int | None = None,
    pool_rows: int | None = None,
    device: torch.device | str = "cpu",
) -> RowClass:
    """Find the row counts for which `fn` (x_MI -> x_MO, row by row) gives the same bits.

    The same `pool_rows` random rows are sent at every candidate count and at every position of a call.
    Counts whose answers depend on the position are dropped, the others are grouped by equality of bits, and
    the group that wastes least over typical batches is returned (or the one that holds `anchor`). The
    smallest candidate alone is the answer when nothing else agrees: a function called with one fixed shape
    agrees with itself. Where `fn` rounds what it has computed so far, it must give that, too, as it was before:
    rounding hides most differences, but not all.
    """
    if not candidates:
        raise ValueError("calibration needs at least one row count to try")
    generator = torch.Generator().manual_seed(0)
    pool_rows = pool_rows or _POOL_ROWS[torch.device(device).type]
    pool_PI = torch.randn(pool_rows, width, generator=generator).to(device)
    groups: list[tuple[Tensor, list[int]]] = []
    for rows in sorted(set(candidates)):
        answer_PO = _answers(fn, pool_PI, rows)
        if answer_PO is None:
            continue
        for known_PO, members in groups:
            if same_bits(known_PO, answer_PO):
                members.append(rows)
                break
        else:
            groups.append((answer_PO, [rows]))
    classes = [RowClass(tuple(members)) for _, members in groups]
    if anchor is not None:
        classes = [found for found in classes if anchor in found.buckets]
    if not classes:
        return RowClass((anchor if anchor is not None else min(candidates),))
    typical = [rows for rows in sorted(set(candidates)) if anchor is None or rows >= anchor]
    call_rows = _CALL_COST_ROWS[torch.device(device).type]
    return min(classes, key=lambda found: sum(found.cost(m, call_rows) / (call_rows + m) for m in typical))


def _answers(fn: RowFunction, pool_PI: Tensor, rows: int) -> Tensor | None:
    """`fn` of each pool row in calls of `rows` rows; None if the position in the call changes the bits."""
    pool = len(pool_PI)
    calls = [[(at + shift) % pool for at in range(rows)] for shift in _shifts(rows, pool)]
    outputs = torch.cat([fn(pool_PI[wanted]) for wanted in calls])
    order = [row for wanted in calls for row in wanted]
    answer_PO = outputs[[order.index(row) for row in range(pool)]]
    return answer_PO if same_bits(outputs, answer_PO[order]) else None


def _shifts(rows: int, pool: int) -> range:
    """How to turn the pool so that all positions of a call are compared with each other.

    One turn gives every position two rows and every row two positions, which links them all; short calls are
    made in all turns, so that every row is seen.
    """
    return range(pool if rows <= pool else 2)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of every bit: NaN equals itself, and 0.0 differs from -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def bit_marks(x_MI: Tensor) -> Tensor:
    """Two numbers a row (M, 2) of an fp32 tensor, of no meaning, in which every bit of the row has a say."""
    weights_I = torch.arange(1, 2 * x_MI.shape[1], 2, dtype=torch.int32, device=x_MI.device)
    parts = (x_MI[at : at + _MARKED_AT_ONCE].contiguous() for at in range(0, len(x_MI), _MARKED_AT_ONCE))
    sums = [(part_MI.view(torch.int32) * weights_I).sum(1, dtype=torch.int64) for part_MI in parts]
    return torch.cat(sums).unsqueeze(1).view(torch.float32)


def map_rows(fn: RowFunction, x_MI: Tensor, row_class: RowClass) -> Tensor:
    """`fn` over all rows of x_MI, calling it with row counts of `row_class` only. Returns x_MO.

    Padding rows are cut off again. Inputs are handed over contiguous and 64-byte aligned,
    because alignment, too, may choose a library's inner loop.
    """
    rows = len(x_MI)
    if rows in row_class.buckets:
        return fn(_aligned(x_MI))
    if rows == 0:
        return fn(x_MI.new_zeros(row_class.buckets[0], *x_MI.shape[1:]))[:0]
    outputs = [
        fn(_padded(x_MI[start : start + count], bucket))[:count] for start, count, bucket in row_class.pieces(rows)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _padded(x_MI: Tensor, bucket: int) -> Tensor:
    if len(x_MI) == bucket:
        return _aligned(x_MI)
    if len(x_MI) == 1:  # in one copy: the commonest case, a decode of one sequence
        return x_MI.expand(bucket, *x_MI.shape[1:]).contiguous()
    return torch.nn.functional.pad(x_MI, (0, 0, 0, bucket - len(x_MI)))


def _aligned(x_MI: Tensor) -> Tensor:
    if x_MI.is_contiguous() and x_MI.data_ptr() % _ALIGNMENT_BYTES == 0:
        return x_MI
    return x_MI.clone(memory_format=torch.contiguous_format)
