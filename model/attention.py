"""Exact grouped-query attention over paged keys and values (arXiv 2305.13245 for the grouping).

One function serves decode and prefill. A query's result has the same bits alone or in company, in one
prefill or token by token: torch's fused attention is called only with numbers of queries, sequences and keys
that were seen, at start, to give the same bits. Which keys are read is planned in `model.attention_plan`.

The keys and values of a call are copied into one buffer first, small enough for the cache. Those that a query
must not see get the weight 0, which is why blocks must hold finite numbers wherever their owner has not
written: see `cleared` of the plan.

On CUDA keys and values are stored in bf16 and widened to fp32.

Tensor suffixes: T tokens, H query heads, P rows of the plan, G kv heads, h heads per kv head, n sequences of a
job, Q query tokens of a sequence, R query rows per kv head (Q times h), S keys, d head_dim.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention_plan import Job, Masks, plan_attention
from model.attention_probe import calibrate_attention
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.fused_attention import fused_attention


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One piece of a job: `queries` (of the job's rows per head) against these keys and values, into `out_nGQhd`."""

    queries: slice
    k_nGSd: Tensor
    v_nGSd: Tensor
    mask: Tensor
    out_nGQhd: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class BoundJob:
    """A job with the buffer that its keys and values (blocks, block_size, 2G, d) are gathered into."""

    rows: slice
    sequences: int
    blocks: Tensor
    gathered: Tensor
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionStep:
    """What all layers of one step share: an `AttentionPlan` bound to its buffers, of which `out_PX` is one."""

    slots_T: Tensor
    cleared: Tensor | None
    gathered_P: Tensor | None
    restored_T: Tensor | None
    out_PX: Tensor
    jobs: tuple[BoundJob, ...]


class PagedAttention:
    """Attention of one model shape on one device; calibrated once, shared by all layers.

    Buffers are reused from call to call: one thread at a time, and an answer holds until the next.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._scale: float = config.head_dim**-0.5
        self._attend = fused_attention(self._device)
        self.shape = calibrate_attention(config, self._device)
        self._masks = Masks(self.shape, self._device)
        self._buffer = torch.empty(0, device=self._device)

    @property
    def numerics(self) -> str:
        """The classes of query tokens and keys, for a numerics domain."""
        return f"{self.shape.token_class}/{self.shape.key_class}"

    def plan(self, batch: ForwardBatch, block_size: int) -> AttentionStep:
        """What all layers of one step share. ValueError where a block table is too short for its context."""
        plan = plan_attention(batch, block_size, self.shape, self._masks, self._device)
        shape = self.shape
        out_PX = torch.empty(
            plan.num_rows, shape.num_kv_heads * shape.heads_per_kv * shape.head_dim, device=self._device
        )
        most = max(len(job.blocks) for job in plan.jobs) * block_size * 2 * shape.num_kv_heads * shape.head_dim
        if len(self._buffer) < most:
            self._buffer = torch.empty(most, device=self._device)
        jobs = tuple(self._bind(job, block_size, out_PX) for job in plan.jobs)
        return AttentionStep(plan.slots_T, plan.cleared, plan.gathered_P, plan.restored_T, out_PX, jobs)

    def _bind(self, job: Job, block_size: int, out_PX: Tensor) -> BoundJob:
        shape, heads = self.shape, self.shape.heads_per_kv
        stored = (len(job.blocks), block_size, 2 * shape.num_kv_heads, shape.head_dim)
        gathered = self._buffer[: math.prod(stored)].view(stored)
        kv_nS2Gd = gathered.view(job.num_sequences, -1, 2, shape.num_kv_heads, shape.head_dim)
        k_nGSd, v_nGSd = kv_nS2Gd[:, :, 0].transpose(1, 2), kv_nS2Gd[:, :, 1].transpose(1, 2)
        answered = (job.num_sequences, job.num_tokens, shape.num_kv_heads, heads, shape.head_dim)
        out_nGQhd = out_PX[job.rows].view(answered).transpose(1, 2)
        calls = [
            Call(
                slice(piece.tokens.start * heads, piece.tokens.stop * heads),
                k_nGSd[:, :, piece.keys],
                v_nGSd[:, :, piece.keys],
                piece.mask,
                out_nGQhd[:, :, piece.tokens],
            )
            for piece in job.pieces
        ]
        return BoundJob(job.rows, job.num_sequences, job.blocks, gathered, tuple(calls))

    def run(self, q_THd: Tensor, kv: Tensor, step: AttentionStep) -> Tensor:
        """Answers (T, H*d) for rotated queries, over a layer's keys and values (blocks, block_size, 2G, d).

        The step's own keys and values must have been written already. The answers are in a buffer of the step.
        """
        q_PHd = q_THd if step.gathered_P is None else q_THd.index_select(0, step.gathered_P)
        q_PGhd = q_PHd.view(len(q_PHd), self.shape.num_kv_heads, self.shape.heads_per_kv, self.shape.head_dim)
        for job in step.jobs:
            if kv.dtype == torch.float32:
                torch.index_select(kv, 0, job.blocks, out=job.gathered)
            else:
                job.gathered.copy_(kv.index_select(0, job.blocks))
            self._answer(q_PGhd[job.rows], job)
        return step.out_PX if step.restored_T is None else step.out_PX.index_select(0, step.restored_T)

    def _answer(self, q_PGhd: Tensor, job: BoundJob) -> None:
        q_nGRd = q_PGhd
        if len(q_PGhd) > job.sequences:
            _, kv_heads, heads, width = q_PGhd.shape
            q_nQGhd = q_PGhd.view(job.sequences, -1, kv_heads, heads, width)
            q_nGRd = q_nQGhd.transpose(1, 2).reshape(job.sequences, kv_heads, -1, width)
        for call in job.calls:
            answers_nGRd = self._attend(
                q_nGRd if len(job.calls) == 1 else q_nGRd[:, :, call.queries],
                call.k_nGSd,
                call.v_nGSd,
                attn_mask=call.mask,
                scale=self._scale,
            )
            call.out_nGQhd.copy_(answers_nGRd.view(call.out_nGQhd.shape))
