"""Drives one forward pass: the backbone computes in halves, and between them the experts are awaited.

The asynchronous twin of `model.transformer.run_local`. The backbone is a generator that owns no I/O, so two
microbatches can take turns here without a change to the model.
"""

import time
from typing import Protocol

from torch import Tensor

from cluster.load import LoadCounter
from model.batch import ForwardBatch
from model.dispatch import DispatchPlan
from model.kv_cache import KVCache
from model.transformer import Backbone


class Experts(Protocol):
    """Where the rows of a layer go: `actors.dispatch.remote_experts`, or `model.experts` behind an async face."""

    async def run(self, layer: int, plan: DispatchPlan) -> Tensor:
        """out_ND for the plan's rows. Raises ExpertUnavailable after a bounded time."""
        ...


class ForwardDriver:
    """One backbone, its KV cache and its experts; `load` counts each layer's rows per expert."""

    def __init__(self, backbone: Backbone, kv: KVCache, experts: Experts, load: LoadCounter) -> None:
        self.load = load
        self._backbone = backbone
        self._kv = kv
        self._experts = experts
        self.expert_wait_s = 0.0

    async def forward(self, batch: ForwardBatch) -> Tensor:
        """logits_RV of `batch.logits_rows`. Raises what the experts raise; the keys written so far stay."""
        forward = self._backbone.forward(batch, self._kv)
        out_ND: Tensor | None = None
        try:
            while True:
                call = next(forward) if out_ND is None else forward.send(out_ND)
                self.load.add(call.layer, call.plan.counts)
                asked_s = time.perf_counter()
                out_ND = await self._experts.run(call.layer, call.plan)
                self.expert_wait_s += time.perf_counter() - asked_s
        except StopIteration as stop:
            logits_RV: Tensor = stop.value
            return logits_RV
        finally:
            forward.close()
