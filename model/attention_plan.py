"""Which keys each query of a step reads: the step's attention cut into equal tiles, once for all layers.

A plan is made of positions and block tables only. Reading keys and values and the arithmetic are
`model.attention`'s work.

Keys are read in tiles of 128 positions, and tiles are grouped in bands of 16, both counted from position 0
and so the same for every query of a sequence. A tile or band that holds nothing for a query changes no bit
of its result, which is why decode and prefill in chunks of any size agree exactly.

Tensor suffixes: T tokens, C (sequence, tile) items of one chunk, Q query tokens per sequence, R query rows
per kv head (Q times heads per kv head, padded), S key positions of a tile.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import ForwardBatch, SequenceSlice
from model.numerics import RowClass

TILE = 128
BAND_TILES = 16
MAX_QUERY_TOKENS = 128
_CHUNK_BYTES = 2 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What a plan must know of the model and of the calibrated kernels.

    `batch_classes` gives, for each row bucket of `row_class`, how many items may be computed in one call.
    """

    head_dim: int
    num_kv_heads: int
    heads_per_kv: int
    window: int | None
    row_class: RowClass
    batch_classes: Mapping[int, RowClass]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Items computed in one call.

    `queries_C` says whose queries, None where the items are the job's sequences one by one; `blocks` says which
    KV blocks. Both are padded to a batch size of the row bucket's class; `count` items are real.

    `hidden` (C, 1 or R, S) is what a query must not see, None where nothing is hidden. `unseen` lists the
    positions, counted over the chunk (item * S + position), that no query of their item sees: their values
    may be anything, NaN included.
    """

    count: int
    queries_C: Tensor | None
    blocks: Tensor
    hidden: Tensor | None
    unseen: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """Up to 16 tiles per sequence, tile by tile: tile i is that of the job's first `counts[i]` sequences."""

    chunks: tuple[Chunk, ...]
    counts: tuple[int, ...]
    queries: Tensor  # of every item: the sequence within the job


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Equally many query tokens of several sequences: all decodes, or one block of one prefill."""

    token_rows: Tensor | slice  # of the step
    num_sequences: int
    query_tokens: int
    row_bucket: int
    bands: tuple[Band, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """Where this step's keys and values are written, and the jobs that answer its queries."""

    slots_T: Tensor
    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class _Queries:
    """Consecutive query tokens of one sequence, from row `row` of the step and position `first`."""

    row: int
    first: int
    count: int
    table: tuple[int, ...]

    @property
    def last(self) -> int:
        return self.first + self.count - 1


def plan_attention(
    batch: ForwardBatch, block_size: int, shape: AttentionShape, device: torch.device | str
) -> AttentionPlan:
    """Slots and jobs of one step. ValueError where a block table is too short for its context."""
    if TILE % block_size:
        raise ValueError(f"block_size must divide {TILE}, got {block_size}")
    slots: list[Tensor] = []
    decodes: list[_Queries] = []
    prefills: list[_Queries] = []
    max_tokens = max(1, min(MAX_QUERY_TOKENS, shape.row_class.buckets[-1] // shape.heads_per_kv))
    row = 0
    for item in batch.sequences:
        slots.append(_slots(item, block_size))
        if item.num_tokens == 1:
            decodes.append(_Queries(row, item.start, 1, item.block_table))
        else:
            prefills += [
                _Queries(row + at, item.start + at, min(max_tokens, item.num_tokens - at), item.block_table)
                for at in range(0, item.num_tokens, max_tokens)
            ]
        row += item.num_tokens
    groups = ([decodes] if decodes else []) + [[queries] for queries in prefills]
    jobs = tuple(_job(group, block_size, shape, device) for group in groups)
    return AttentionPlan(torch.cat(slots).to(device), jobs)


def _slots(item: SequenceSlice, block_size: int) -> Tensor:
    if len(item.block_table) * block_size < item.context_len:
        raise ValueError(
            f"a context of {item.context_len} needs more than {len(item.block_table)} blocks of {block_size}"
        )
    positions = torch.arange(item.start, item.context_len)
    return torch.tensor(item.block_table)[positions // block_size] * block_size + positions % block_size


def _job(group: Sequence[_Queries], block_size: int, shape: AttentionShape, device: torch.device | str) -> Job:
    base = [_first_tile(queries, shape.window) for queries in group]
    tiles = [queries.last // TILE + 1 - start for queries, start in zip(group, base, strict=True)]
    order = sorted(range(len(group)), key=lambda index: -tiles[index])
    group = [group[index] for index in order]
    tiles = [tiles[index] for index in order]
    builder = _BandBuilder(group, [base[index] for index in order], block_size, shape, device)
    bands = [builder.band(start, tiles) for start in range(0, tiles[0], BAND_TILES)]
    query_tokens = group[0].count
    rows = [queries.row + at for queries in group for at in range(query_tokens)]
    adjacent = rows == list(range(rows[0], rows[0] + len(rows)))
    token_rows = slice(rows[0], rows[0] + len(rows)) if adjacent else torch.tensor(rows, device=device)
    return Job(token_rows, len(group), query_tokens, builder.row_bucket, tuple(bands))


def _first_tile(queries: _Queries, window: int | None) -> int:
    """The first tile of the band that holds the earliest key that any of these queries sees."""
    if window is None:
        return 0
    return max(0, queries.first - window + 1) // (TILE * BAND_TILES) * BAND_TILES


class _BandBuilder:
    """Turns the tiles of a job's sequences (longest first) into bands of chunks."""

    def __init__(
        self,
        group: Sequence[_Queries],
        base: Sequence[int],
        block_size: int,
        shape: AttentionShape,
        device: torch.device | str,
    ) -> None:
        self._shape = shape
        self._device = device
        self._query_tokens = group[0].count
        self.row_bucket = shape.row_class.bucket(self._query_tokens * shape.heads_per_kv)
        self._batch_class = _within(shape, self.row_bucket)
        self._base = torch.tensor(base)
        self._first = torch.tensor([queries.first for queries in group])
        self._last = torch.tensor([queries.last for queries in group])
        per_tile = TILE // block_size
        width = (max(queries.last for queries in group) // TILE + 1) * per_tile
        padded = [list(queries.table[:width]) + [0] * (width - len(queries.table)) for queries in group]
        self._blocks = torch.tensor(padded).view(len(group), -1, per_tile)

    def band(self, start: int, tiles: Sequence[int]) -> Band:
        """The band from relative tile `start` on; `tiles` are the sequences' tile counts, descending."""
        counts = [sum(tile > start + at for tile in tiles) for at in range(BAND_TILES)]
        counts = [count for count in counts if count]
        sequence = torch.cat([torch.arange(count) for count in counts])
        at = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        tile = self._base[sequence] + start + at
        chunks = [
            self._chunk(sequence[part : part + count], tile[part : part + count], bucket)
            for part, count, bucket in self._batch_class.pieces(len(sequence))
        ]
        return Band(tuple(chunks), tuple(counts), sequence.to(self._device))

    def _chunk(self, sequence_C: Tensor, tile_C: Tensor, bucket: int) -> Chunk:
        count = len(sequence_C)
        filler = (0, bucket - count)  # repeats sequence 0 and tile 0; the answers are dropped
        sequence_C = torch.nn.functional.pad(sequence_C, filler)
        tile_C = torch.nn.functional.pad(tile_C, filler)
        hidden, unseen = self._masks(self._first[sequence_C], self._last[sequence_C], tile_C)
        blocks = self._blocks[sequence_C, tile_C].reshape(-1)
        one_each = sequence_C.tolist() == list(range(len(self._first)))
        queries_C = None if one_each else sequence_C.to(self._device)
        return Chunk(count, queries_C, blocks.to(self._device), hidden, unseen)

    def _masks(self, first_C: Tensor, last_C: Tensor, tile_C: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`hidden` and `unseen` of a chunk whose query positions are first..last."""
        window = self._shape.window
        begins_C, ends_C = tile_C * TILE, tile_C * TILE + TILE - 1
        whole_C = ends_C <= first_C
        if window is not None:
            whole_C &= begins_C > last_C - window
        if bool(whole_C.all()):
            return None, None
        keys_CS = begins_C[:, None] + torch.arange(TILE)
        unseen_CS = keys_CS > last_C[:, None]
        query_CQ1 = (first_C[:, None] + torch.arange(self._query_tokens)).unsqueeze(-1)
        hidden_CQS = keys_CS[:, None, :] > query_CQ1
        if window is not None:
            unseen_CS |= keys_CS <= first_C[:, None] - window
            hidden_CQS |= keys_CS[:, None, :] <= query_CQ1 - window
        unseen = unseen_CS.view(-1).nonzero().view(-1)
        return self._rows(hidden_CQS).to(self._device), unseen.to(self._device) if len(unseen) else None

    def _rows(self, hidden_CQS: Tensor) -> Tensor:
        """One row per query row: repeated for the heads of a kv head, padded rows see everything."""
        if self._query_tokens == 1:
            return hidden_CQS
        heads = self._shape.heads_per_kv
        hidden_CRS = hidden_CQS.repeat_interleave(heads, dim=1)
        return torch.nn.functional.pad(hidden_CRS, (0, 0, 0, self.row_bucket - hidden_CRS.shape[1]))


def _within(shape: AttentionShape, row_bucket: int) -> RowClass:
    """The batch sizes of this row bucket whose working set stays in the cache."""
    item_bytes = 4 * shape.num_kv_heads * TILE * (2 * shape.head_dim + row_bucket)
    fitting = [size for size in shape.batch_classes[row_bucket].buckets if size * item_bytes <= _CHUNK_BYTES]
    return RowClass(tuple(fitting) or shape.batch_classes[row_bucket].buckets[:1])
