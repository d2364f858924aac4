"""Which keys each query of a step reads: the step's attention cut into few equal calls, once for all layers.

A plan is made of positions and block tables only. Reading keys and values and the arithmetic are
`model.attention`'s work.

New tokens are cut into pieces of calibrated token counts, keys into calibrated lengths counted from a multiple
of 512. Sequences whose pieces are alike and whose keys are about equally many share a call. Keys that a query
must not see are masked, and change no bit of its result: so decode and prefill in chunks of any size agree.

Tensor suffixes: T tokens, P rows of the plan (tokens, padded and in the order of the jobs), n sequences of a
job, Q query tokens of a piece, R query rows (Q times heads per kv head), S keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import ForwardBatch, SequenceSlice
from model.device_calls import upload
from model.numerics import RowClass

LARGEST_BLOCK = 128
KEY_SPAN = 512
CHUNK_BYTES = 1 << 20  # keys and values read by one call: they should still be in the cache when used
WASTE_BYTES = 1 << 17  # padding of one sequence's keys and values that is cheaper than a call of its own
# A GPU reads megabytes in the time that it takes to start a call.
CUDA_CHUNK_BYTES = 1 << 28
CUDA_WASTE_BYTES = 1 << 21


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What a plan must know of the model and of the calibrated kernel.

    A call may have the query tokens per sequence of `token_class`, the sequences of `batch_class` (which holds
    1), and as many keys as whole spans of 512 and one of `key_class` (which holds 512) make together.
    """

    head_dim: int
    num_kv_heads: int
    heads_per_kv: int
    window: int | None
    token_class: RowClass
    key_class: RowClass
    batch_class: RowClass
    chunk_bytes: int = CHUNK_BYTES
    waste_bytes: int = WASTE_BYTES

    @property
    def key_bytes(self) -> int:
        """fp32 keys and values of one position."""
        return 2 * 4 * self.num_kv_heads * self.head_dim

    def key_length(self, keys: int) -> int:
        """The smallest allowed number of keys that holds `keys`."""
        spans, rest = divmod(keys, KEY_SPAN)
        return spans * KEY_SPAN + (self.key_class.bucket(rest) if rest else 0)


class Masks:
    """What is added to scores: 0 where a query sees a key, -inf where not; views of one table, grown as needed.

    Row r belongs to query token r // heads, column x to the key at distance x - reach from the first token's. On a GPU
    masks are made anew, contiguous, as its kernel wants them.
    """

    def __init__(self, shape: AttentionShape, device: torch.device | str) -> None:
        self._rows = shape.token_class.buckets[-1] * shape.heads_per_kv
        self._heads = shape.heads_per_kv
        self._window = shape.window
        self._device = device
        self._reach = 0
        self._table = torch.empty(0, device=device)

    def rows(self, firsts: Sequence[int], rows: int, keys: int) -> Tensor:
        """(n or 1, 1, rows, keys): per sequence the first query's position, counted from the first key's."""
        if torch.device(self._device).type == "cuda":
            return self.made(firsts, rows, keys)
        if max(max(firsts), keys) > self._reach:
            self._grow(max(max(firsts), keys))
        starts = [self._reach - first for first in firsts]
        if starts.count(starts[0]) == len(starts):
            return self._table[None, None, :rows, starts[0] : starts[0] + keys]
        return torch.stack([self._table[None, :rows, start : start + keys] for start in starts])

    def made(self, firsts: Sequence[int], rows: int, keys: int) -> Tensor:
        """The same without the table, of the full size (n, 1, rows, keys)."""
        first_n = upload(torch.tensor(firsts), self._device)
        token_R = torch.arange(rows, device=self._device) // self._heads
        ahead_nRS = torch.arange(keys, device=self._device) - (first_n[:, None, None] + token_R[:, None])
        hidden = ahead_nRS > 0
        if self._window is not None:
            hidden |= ahead_nRS <= -self._window
        return torch.zeros(hidden.shape, device=self._device).masked_fill_(hidden, -torch.inf).unsqueeze(1)

    def _grow(self, reach: int) -> None:
        self._reach = -(-reach // KEY_SPAN) * KEY_SPAN
        distance = torch.arange(2 * self._reach) - self._reach
        token = (torch.arange(self._rows) // self._heads).unsqueeze(1)
        hidden = distance > token
        if self._window is not None:
            hidden |= distance <= token - self._window
        self._table = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf).to(self._device)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """The same query tokens of every sequence of a job: one call.

    `keys` are counted within the job's; `mask` is (n or 1, 1, R or 1, S).
    """

    tokens: slice
    keys: slice
    mask: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Sequences with like pieces. Rows `rows` of the plan are theirs: `num_tokens` each, one sequence after another.

    `blocks` are the KV blocks to read, equally many per sequence.
    """

    rows: slice
    num_sequences: int
    num_tokens: int
    blocks: Tensor
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """Where this step's keys and values are written, and the jobs that answer its queries.

    `slots_T` are the KV slots of the tokens; `cleared`, where there are any, those to be zeroed: what follows the
    last token in a block that is written for the first time. Row p of the plan is token `gathered_P[p]` of the
    step, and token t's answer is row `restored_T[t]`; None where both orders are the same.
    """

    slots_T: Tensor
    cleared: Tensor | None
    gathered_P: Tensor | None
    restored_T: Tensor | None
    num_rows: int
    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class _Work:
    """One sequence's queries: tokens from row `row` of the step and position `first` on, keys from `base` on."""

    row: int
    first: int
    counts: tuple[int, ...]  # tokens of each piece
    base: int
    keys: int  # as many as are read, counted from `base`
    blocks: tuple[int, ...]  # from `base` to the last token


def plan_attention(
    batch: ForwardBatch, block_size: int, shape: AttentionShape, masks: Masks, device: torch.device | str
) -> AttentionPlan:
    """Slots and jobs of one step. ValueError where a block table is too short for its context."""
    if LARGEST_BLOCK % block_size:
        raise ValueError(f"block_size must divide {LARGEST_BLOCK}, got {block_size}")
    slots: list[int] = []
    cleared: list[int] = []
    groups: dict[tuple[int, ...], list[_Work]] = {}
    row = 0
    for item in batch.sequences:
        _check_table(item, block_size)
        slots += _slots(item, block_size)
        cleared += _cleared(item, block_size)
        work = _work(item, row, block_size, shape)
        groups.setdefault(tuple(map(shape.token_class.bucket, work.counts)), []).append(work)
        row += item.num_tokens
    rows = _Rows()
    jobs = [
        _job(members, buckets, rows, block_size, shape, masks, device)
        for buckets, group in groups.items()
        for members in _shared(group, shape)
    ]
    gathered_P, restored_T = rows.orders(device)
    return AttentionPlan(
        upload(torch.tensor(slots), device),
        upload(torch.tensor(cleared), device) if cleared else None,
        gathered_P,
        restored_T,
        len(rows.tokens),
        tuple(jobs),
    )


def _check_table(item: SequenceSlice, block_size: int) -> None:
    if len(item.block_table) * block_size < item.context_len:
        raise ValueError(
            f"a context of {item.context_len} needs more than {len(item.block_table)} blocks of {block_size}"
        )


def _slots(item: SequenceSlice, block_size: int) -> list[int]:
    table = item.block_table
    return [
        table[position // block_size] * block_size + position % block_size
        for position in range(item.start, item.context_len)
    ]


def _cleared(item: SequenceSlice, block_size: int) -> range:
    """Slots behind the last token, if its block is written from its beginning in this step."""
    index, used = divmod(item.context_len - 1, block_size)
    if item.start > index * block_size:
        return range(0)
    at = item.block_table[index] * block_size
    return range(at + used + 1, at + block_size)


def _work(item: SequenceSlice, row: int, block_size: int, shape: AttentionShape) -> _Work:
    longest = shape.token_class.buckets[-1]
    whole, rest = divmod(item.num_tokens, longest)
    counts = (longest,) * whole + ((rest,) if rest else ())
    base = _base(item.start, shape.window)
    blocks = item.block_table[base // block_size : (item.context_len - 1) // block_size + 1]
    return _Work(row, item.start, counts, base, shape.key_length(item.context_len - base), blocks)


def _base(first: int, window: int | None) -> int:
    """The start of the span that holds the earliest key that a query at `first`, or any later one, sees."""
    return 0 if window is None else max(0, first - window + 1) // KEY_SPAN * KEY_SPAN


def _shared(group: list[_Work], shape: AttentionShape) -> Iterator[list[_Work]]:
    """Cut works with like pieces into those of one job each, longest first."""
    group = sorted(group, key=lambda work: -work.keys)
    while group:
        keys = group[0].keys
        most = min(len(group), shape.chunk_bytes // (keys * shape.key_bytes))
        alike = next((at for at in range(1, most) if _wasteful(keys - group[at].keys, shape)), max(1, most))
        size = max(size for size in shape.batch_class.buckets if size <= alike)
        yield group[:size]
        group = group[size:]


def _wasteful(padding: int, shape: AttentionShape) -> bool:
    return padding * shape.key_bytes > shape.waste_bytes


class _Rows:
    """The plan's rows, as they are handed out to jobs."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._row_of: dict[int, int] = {}

    def take(self, members: Sequence[_Work], buckets: Sequence[int]) -> slice:
        """The members' tokens, one member after another; the last piece is padded with tokens that count twice."""
        start = len(self.tokens)
        for work in members:
            padding = sum(buckets) - sum(work.counts)
            tokens = range(work.row, work.row + sum(work.counts))
            self._row_of.update(zip(tokens, range(len(self.tokens), len(self.tokens) + len(tokens)), strict=True))
            self.tokens += [*tokens, *([work.row] * padding)]
        return slice(start, len(self.tokens))

    def orders(self, device: torch.device | str) -> tuple[Tensor | None, Tensor | None]:
        """`gathered_P` and `restored_T` of the plan."""
        if self.tokens == list(range(len(self.tokens))):
            return None, None
        restored = [self._row_of[token] for token in range(len(self._row_of))]
        return upload(torch.tensor(self.tokens), device), upload(torch.tensor(restored), device)


def _job(
    members: Sequence[_Work],
    buckets: Sequence[int],
    rows: _Rows,
    block_size: int,
    shape: AttentionShape,
    masks: Masks,
    device: torch.device | str,
) -> Job:
    per_sequence = -(-members[0].keys // block_size)
    blocks: list[int] = []
    for work in members:  # a sequence's last block stands in for those it does not have: it knows no strangers
        blocks += work.blocks + work.blocks[-1:] * (per_sequence - len(work.blocks))
    pieces, at = [], 0
    for index, bucket in enumerate(buckets):
        pieces.append(_piece(members, index, slice(at, at + bucket), shape, masks))
        at += bucket
    return Job(rows.take(members, buckets), len(members), at, upload(torch.tensor(blocks), device), tuple(pieces))


def _piece(members: Sequence[_Work], index: int, tokens: slice, shape: AttentionShape, masks: Masks) -> Piece:
    """From the first key that any member's queries see, at a multiple of 512, to the last, padded."""
    start = min(_base(work.first + tokens.start, shape.window) - work.base for work in members)
    positions = [work.first + tokens.start - work.base - start for work in members]
    stop = max(position + work.counts[index] for position, work in zip(positions, members, strict=True))
    keys = shape.key_length(stop)
    count = tokens.stop - tokens.start
    mask = masks.rows(positions, 1 if count == 1 else count * shape.heads_per_kv, keys)
    return Piece(tokens, slice(start, start + keys), mask)
