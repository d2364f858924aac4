"""Drives one forward pass: the backbone computes in halves, and between them the experts are awaited.

The asynchronous twin of `model.transformer.run_local`. The backbone is a generator that owns no I/O, so
microbatches take turns here without a change to the model: one computes attention while another is at the experts.
"""

import asyncio
import time
from typing import Protocol

from torch import Tensor

from cluster.load import LoadCounter
from model.batch import ForwardBatch
from model.dispatch import DispatchPlan
from model.kv_cache import KVCache
from model.transformer import Backbone

TURN_S = 0.005
"""The event loop gets a turn at least so often: rounds over same-node lanes do not need one."""


class ExpertWork(Protocol):
    """A layer's rows, on their way."""

    async def result(self) -> Tensor:
        """out_ND, to be awaited once. Raises ExpertUnavailable after a bounded time."""
        ...

    def abandon(self) -> None:
        """Nobody waits any more. May be called twice, and after `result`."""
        ...


class Experts(Protocol):
    """Where the rows of a layer go: `actors.dispatch.remote_experts`, or `model.experts` behind this face."""

    def start(self, layer: int, plan: DispatchPlan) -> ExpertWork:
        """Sends the plan's rows."""
        ...


class ForwardDriver:
    """One backbone, its KV cache and its experts; `load` counts each layer's rows per expert."""

    def __init__(self, backbone: Backbone, kv: KVCache, experts: Experts, load: LoadCounter) -> None:
        self.load = load
        self.backbone = backbone
        self.experts = experts
        self._kv = kv
        self.expert_wait_s = 0.0

    async def forward(self, batch: ForwardBatch) -> Tensor:
        """logits_RV of `batch.logits_rows`. Raises what the experts raise; the keys written so far stay."""
        forward = self.backbone.forward(batch, self._kv)
        out_ND: Tensor | None = None
        turn_s = time.perf_counter()
        try:
            while True:
                call = next(forward) if out_ND is None else forward.send(out_ND)
                self.load.add(call.layer, call.plan.counts)
                work = self.experts.start(call.layer, call.plan)
                asked_s = time.perf_counter()
                out_ND = await work.result()
                now_s = time.perf_counter()
                self.expert_wait_s += now_s - asked_s
                if now_s - turn_s > TURN_S:
                    await asyncio.sleep(0)
                    turn_s = time.perf_counter()
        except StopIteration as stop:
            logits_RV: Tensor = stop.value
            return logits_RV
        finally:
            forward.close()
