"""Exact grouped-query attention over paged keys and values (arXiv 2305.13245 for the grouping).

One function serves decode and prefill. A query's result has the same bits alone or in company, in one
prefill or token by token: every product is called with calibrated row and batch counts only, keys come in
fixed tiles, and tiles are joined in ascending order by the online softmax (arXiv 1805.02867). What is
masked is replaced, never multiplied by zero. Which tiles are read is planned in `model.attention_plan`.

On CUDA keys and values are stored in bf16 and widened to fp32 per tile; written plainly, and not run there
by the test suite.

Tensor suffixes: T tokens, G kv heads, C items of a chunk, I items of a band, n sequences of a job, R query
rows per kv head, S key positions of a tile, d head_dim, e = d + 1 (the values' weighted sum, then the
weights' sum).
"""

import torch
from torch import Tensor

from model.attention_plan import (
    TILE,
    AttentionPlan,
    AttentionShape,
    Band,
    Chunk,
    Job,
    plan_attention,
)
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.numerics import RowClass, calibrate_rows

_FLOOR = -1e30  # stands for "sees nothing yet": exp(_FLOOR - x) is 0 and exp(_FLOOR - _FLOOR) is no NaN
_LOWEST = -80.0  # exp of less is worth nothing beside the 1.0 of the largest, and underflow costs 200 times more
_ROW_CANDIDATES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
_BATCH_CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_BATCH_ROWS = 512
_BATCH_POOL = 2

Partial = tuple[Tensor, Tensor]  # the largest score (.., R, 1), and sums relative to it (.., R, e)


class PagedAttention:
    """Attention of one model shape on one device; calibrated once, shared by all layers."""

    def __init__(self, config: ModelConfig, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._scale: float = config.head_dim**-0.5
        heads_per_kv = config.num_heads // config.num_kv_heads
        probe = _Probe(config, self._device)
        candidates = {heads_per_kv, *(rows for rows in _ROW_CANDIDATES if rows >= heads_per_kv)}
        row_class = calibrate_rows(probe.rows, config.head_dim, sorted(candidates), device=self._device)
        self.shape = AttentionShape(
            head_dim=config.head_dim,
            num_kv_heads=config.num_kv_heads,
            heads_per_kv=heads_per_kv,
            window=config.sliding_window,
            row_class=row_class,
            batch_classes={rows: probe.batch_class(rows) for rows in row_class.buckets},
        )

    @property
    def numerics(self) -> str:
        """The row class, for a numerics domain."""
        return str(self.shape.row_class)

    def plan(self, batch: ForwardBatch, block_size: int) -> AttentionPlan:
        """What all layers of one step share."""
        return plan_attention(batch, block_size, self.shape, self._device)

    @torch.no_grad()
    def run(self, q_THd: Tensor, kv: Tensor, plan: AttentionPlan) -> Tensor:
        """Answers (T, H*d) for rotated queries, over a layer's keys and values (2G, blocks, block_size, d).

        The step's own keys and values must have been written already.
        """
        out_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        for job in plan.jobs:
            q_GnRd = self._gather_queries(q_THd, job)
            out_GnRd = _normalised(_attend(q_GnRd, kv, job))
            self._scatter_rows(out_GnRd, out_THd, job)
        return out_THd.flatten(1)

    def _gather_queries(self, q_THd: Tensor, job: Job) -> Tensor:
        """Scaled queries, (token, head of the group) as rows, padded with zeros to the row bucket."""
        shape, rows = self.shape, job.query_tokens * self.shape.heads_per_kv
        grouped = (
            job.num_sequences,
            job.query_tokens,
            shape.num_kv_heads,
            shape.heads_per_kv,
            shape.head_dim,
        )
        wanted = job.token_rows
        q_THd = q_THd[wanted] if isinstance(wanted, slice) else q_THd.index_select(0, wanted)
        q_GnRd = (q_THd * self._scale).view(grouped).permute(2, 0, 1, 3, 4)
        q_GnRd = q_GnRd.reshape(shape.num_kv_heads, job.num_sequences, rows, shape.head_dim)
        if rows == job.row_bucket:
            return q_GnRd.contiguous()
        return torch.nn.functional.pad(q_GnRd, (0, 0, 0, job.row_bucket - rows))

    def _scatter_rows(self, out_GnRd: Tensor, out_THd: Tensor, job: Job) -> None:
        shape, rows = self.shape, job.query_tokens * self.shape.heads_per_kv
        grouped = (
            shape.num_kv_heads,
            job.num_sequences,
            job.query_tokens,
            shape.heads_per_kv,
            shape.head_dim,
        )
        out = out_GnRd[:, :, :rows].reshape(grouped).permute(1, 2, 0, 3, 4)
        if isinstance(job.token_rows, slice):
            out_THd[job.token_rows].view(out.shape).copy_(out)
        else:
            out_THd.index_copy_(0, job.token_rows, out.reshape(-1, *out_THd.shape[1:]))


def _attend(q_GnRd: Tensor, kv: Tensor, job: Job) -> Partial:
    """All bands of a job, joined in ascending order. Sequences are sorted, longest first."""
    top_GnR1, sums_GnRe = _band(q_GnRd, kv, job.bands[0])
    for band in job.bands[1:]:
        active = band.counts[0]
        joined = _join((top_GnR1[:, :active], sums_GnRe[:, :active]), _band(q_GnRd, kv, band))
        top_GnR1[:, :active], sums_GnRe[:, :active] = joined
    return top_GnR1, sums_GnRe


def _band(q_GnRd: Tensor, kv: Tensor, band: Band) -> Partial:
    """The band's tiles, each on its own, then summed in ascending order relative to the band's best score."""
    parts = [_chunk(q_GnRd, kv, chunk) for chunk in band.chunks]
    top_GIR1, sums_GIRe = parts[0]
    if len(parts) > 1:
        top_GIR1 = torch.cat([top for top, _ in parts], dim=1)
        sums_GIRe = torch.cat([sums for _, sums in parts], dim=1)
    if len(band.counts) == 1:
        return top_GIR1, sums_GIRe
    active, at = band.counts[0], band.counts[0]
    best_GnR1 = top_GIR1[:, :active].clone()
    for count in band.counts[1:]:
        seen = best_GnR1[:, :count]
        torch.maximum(seen, top_GIR1[:, at : at + count], out=seen)
        at += count
    sums_GIRe.mul_(top_GIR1.sub_(best_GnR1.index_select(1, band.queries)).exp_())
    total_GnRe, at = sums_GIRe[:, :active], active
    for count in band.counts[1:]:
        total_GnRe[:, :count].add_(sums_GIRe[:, at : at + count])
        at += count
    return best_GnR1, total_GnRe


def _chunk(q_GnRd: Tensor, kv: Tensor, chunk: Chunk) -> Partial:
    heads, width = q_GnRd.shape[0], q_GnRd.shape[-1]
    tiles = kv.index_select(1, chunk.blocks).to(torch.float32).view(2, heads, -1, TILE, width)
    q_GCRd = q_GnRd if chunk.queries_C is None else q_GnRd.index_select(1, chunk.queries_C)
    if chunk.unseen is not None:
        tiles[1].view(heads, -1, width).index_fill_(1, chunk.unseen, 0.0)
    top_GCR1, sums_GCRe = _tile(q_GCRd, tiles[0], tiles[1], chunk.hidden)
    return top_GCR1[:, : chunk.count], sums_GCRe[:, : chunk.count]


def _tile(q_GCRd: Tensor, k_GCSd: Tensor, v_GCSd: Tensor, hidden: Tensor | None) -> Partial:
    """Softmax numerators over one tile, relative to the tile's own largest score."""
    heads, items, rows, width = q_GCRd.shape
    flat = heads * items
    keys = k_GCSd.view(flat, TILE, width).transpose(1, 2)
    scores = torch.bmm(q_GCRd.view(flat, rows, width), keys).view(heads, items, rows, TILE)
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    top_GCR1 = scores.amax(-1, keepdim=True).clamp_(min=_FLOOR)
    scores.sub_(top_GCR1).clamp_(min=_LOWEST).exp_()
    if hidden is not None:
        scores.masked_fill_(hidden, 0.0)
    mixed = torch.bmm(scores.view(flat, rows, TILE), v_GCSd.view(flat, TILE, width))
    sums_GCRe = torch.cat((mixed.view(heads, items, rows, width), scores.sum(-1, keepdim=True)), dim=-1)
    return top_GCR1, sums_GCRe


def _join(a: Partial, b: Partial) -> Partial:
    """Two partial softmaxes as one; a side that saw nothing (its top is the floor) changes no bit."""
    top = torch.maximum(a[0], b[0])
    sums = (a[0] - top).exp_().mul(a[1]).add_((b[0] - top).exp_().mul(b[1]))
    return top, sums


def _normalised(partial: Partial) -> Tensor:
    """Weighted sums divided by the weights' sum; adding 0.0 gives every zero the same sign."""
    sums = partial[1]
    return (sums[..., :-1] / sums[..., -1:]).add_(0.0)


class _Probe:
    """Runs the arithmetic on random keys and values, for calibration: two tiles, joined and normalised."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(2)
        shape = (4, config.num_kv_heads, 1, TILE, config.head_dim)
        self._tiles = torch.randn(shape, generator=generator).to(device)
        self._width = config.head_dim
        self._device = device

    def rows(self, x_Rd: Tensor) -> Tensor:
        """One sequence with R query rows; the answers of all kv heads side by side."""
        return self._answers(x_Rd.unsqueeze(0))[0]

    def batch_class(self, rows: int) -> RowClass:
        """How many sequences of `rows` query rows may be computed together; 1 always may."""

        def batched(x_CX: Tensor) -> Tensor:
            return self._answers(x_CX.view(len(x_CX), rows, self._width)).flatten(1)

        sizes = [size for size in _BATCH_CANDIDATES if size == 1 or size * rows <= _BATCH_ROWS]
        return calibrate_rows(batched, rows * self._width, sizes, anchor=1, pool_rows=_BATCH_POOL, device=self._device)

    def _answers(self, q_CRd: Tensor) -> Tensor:
        heads, items = self._tiles.shape[1], len(q_CRd)
        q_GCRd = q_CRd.expand(heads, *q_CRd.shape).contiguous()
        k1, v1, k2, v2 = (tile.expand(-1, items, -1, -1).contiguous() for tile in self._tiles)
        joined = _join(_tile(q_GCRd, k1, v1, None), _tile(q_GCRd, k2, v2, None))
        return _normalised(joined).permute(1, 2, 0, 3).flatten(2)
