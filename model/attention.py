"""Exact grouped-query attention over paged keys and values (arXiv 2305.13245 for the grouping).

One function serves decode and prefill. A query's result has the same bits alone or in company, in one
prefill or token by token: torch's fused attention is called only with numbers of queries, sequences and keys
that were seen, at start, to give the same bits. Which keys are read is planned in `model.attention_plan`.

The keys and values of a call are copied into one buffer first, small enough for the cache. Those that a query
must not see get the weight 0, which is why blocks must hold finite numbers wherever their owner has not
written: see `cleared` of the plan.

On CUDA keys and values are stored in bf16 and widened to fp32; written plainly, and not run there by the test
suite.

Tensor suffixes: T tokens, H query heads, P rows of the plan, G kv heads, h heads per kv head, n sequences of a
job, Q query tokens of a sequence, R query rows per kv head (Q times h), S keys, d head_dim.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.attention_plan import AttentionPlan, AttentionShape, Job, Masks, plan_attention
from model.attention_probe import calibrate_attention
from model.batch import ForwardBatch
from model.config import ModelConfig


class PagedAttention:
    """Attention of one model shape on one device; calibrated once, shared by all layers.

    Buffers are reused from call to call: one thread at a time.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._scale: float = config.head_dim**-0.5
        self.shape = calibrate_attention(config, self._device)
        self._masks = Masks(self.shape, self._device)
        self._buffer = torch.empty(0, device=self._device)

    @property
    def numerics(self) -> str:
        """The classes of query tokens and keys, for a numerics domain."""
        return f"{self.shape.token_class}/{self.shape.key_class}"

    def plan(self, batch: ForwardBatch, block_size: int) -> AttentionPlan:
        """What all layers of one step share."""
        return plan_attention(batch, block_size, self.shape, self._masks, self._device)

    @torch.no_grad()
    def run(self, q_THd: Tensor, kv: Tensor, plan: AttentionPlan) -> Tensor:
        """Answers (T, H*d) for rotated queries, over a layer's keys and values (2G, blocks, block_size, d).

        The step's own keys and values must have been written already.
        """
        q_PHd = q_THd if plan.gathered_P is None else q_THd.index_select(0, plan.gathered_P)
        out_PX = torch.empty(plan.num_rows, q_THd.shape[1] * q_THd.shape[2], device=q_THd.device)
        for job in plan.jobs:
            self._answer(q_PHd[job.rows], kv, job, out_PX[job.rows])
        return out_PX if plan.restored_T is None else out_PX.index_select(0, plan.restored_T)

    def _answer(self, q_PHd: Tensor, kv: Tensor, job: Job, out_PX: Tensor) -> None:
        """One job: its keys and values gathered once, then a call per piece."""
        shape = self.shape
        heads = shape.heads_per_kv
        grouped = (job.num_sequences, job.num_tokens, shape.num_kv_heads, heads, shape.head_dim)
        out_nQGhd = out_PX.view(grouped)
        q_nGRd = q_PHd.view(grouped).transpose(1, 2).reshape(job.num_sequences, shape.num_kv_heads, -1, shape.head_dim)
        k_nGSd, v_nGSd = self._gather(kv, job)
        for piece in job.pieces:
            tokens, keys = piece.tokens, piece.keys
            answers_nGRd = scaled_dot_product_attention(
                q_nGRd[:, :, tokens.start * heads : tokens.stop * heads],
                k_nGSd[:, :, keys],
                v_nGSd[:, :, keys],
                attn_mask=piece.mask,
                scale=self._scale,
            )
            out_nQGhd[:, tokens].copy_(answers_nGRd.unflatten(2, (-1, heads)).transpose(1, 2))

    def _gather(self, kv: Tensor, job: Job) -> tuple[Tensor, Tensor]:
        """Keys and values (n, G, S, d) of the job's blocks, in the buffer."""
        heads, _, block_size, width = kv.shape
        wanted = (heads, len(job.blocks), block_size, width)
        size = heads * len(job.blocks) * block_size * width
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, device=self._device)
        found = self._buffer[:size].view(wanted)
        if kv.dtype == found.dtype:
            torch.index_select(kv, 1, job.blocks, out=found)
        else:
            found.copy_(kv.index_select(1, job.blocks))
        kv_2nGSd = found.view(2, heads // 2, job.num_sequences, -1, width).transpose(1, 2)
        return kv_2nGSd[0], kv_2nGSd[1]
