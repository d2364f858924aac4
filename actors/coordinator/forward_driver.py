"""Drives one forward pass: the backbone computes in halves, and between them the experts are awaited.

The asynchronous twin of `model.transformer.run_local`. The backbone is a generator that owns no I/O, so
microbatches take turns here without a change to the model: one computes attention while another is at the experts.
"""

import asyncio
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor

from cluster.load import LoadCounter
from cluster.microbatching import MicrobatchChooser
from model.batch import ForwardBatch
from model.dispatch import Answers, DispatchPlan
from model.kv_cache import KVCache
from model.microbatch import split_batch
from model.routing import RoutingCapture
from model.transformer import Backbone, ExpertCall

TURN_S = 0.005
"""The event loop gets a turn at least so often: rounds over same-node lanes do not need one."""
MOST_TURNS = 6
"""To take a request in, and to refuse it, takes the loop a few turns; after a long layer it gets them all at once."""


class ExpertWork(Protocol):
    """A layer's rows, on their way."""

    async def result(self) -> Answers:
        """out_ND, to be awaited once. Raises ExpertUnavailable after a bounded time."""
        ...

    def abandon(self) -> None:
        """Nobody waits any more. May be called twice, and after `result`."""
        ...


class Experts(Protocol):
    """Where the rows of a layer go: `actors.dispatch.remote_experts`, or `model.experts` behind this face."""

    def start(self, layer: int, plan: DispatchPlan, deadline_s: float | None = None) -> ExpertWork:
        """Sends the plan's rows; after `deadline_s`, on the event loop's clock, nobody wants the answers."""
        ...


class ForwardDriver:
    """One backbone, its KV cache and its experts; `load` counts each layer's rows per expert.

    `expert_wait_s` is the time spent doing nothing but wait for experts, since start.
    """

    def __init__(
        self,
        backbone: Backbone,
        kv: KVCache,
        experts: Experts,
        load: LoadCounter,
        microbatches: MicrobatchChooser | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.load = load
        self.backbone = backbone
        self.experts = experts
        self.expert_wait_s = 0.0
        self.microbatches = MicrobatchChooser() if microbatches is None else microbatches
        self._kv = kv
        self._clock = clock

    async def forward(
        self, batch: ForwardBatch, deadline_s: float | None = None, captures: list[RoutingCapture] | None = None
    ) -> Tensor:
        """logits_RV of `batch.logits_rows`. Raises what the experts raise; the keys written so far stay.

        `deadline_s`, on the event loop's clock, is when nobody wants them any more. Which experts the tokens took is
        left in `captures`, where it is given: one for each microbatch, in their order.
        """
        began_s = self._clock()
        count = self.microbatches.choose(batch.num_tokens)
        logits_RV = await self._run(split_batch(batch, count) if count > 1 else (batch,), deadline_s, captures)
        self.microbatches.observe(batch.num_tokens, count, self._clock() - began_s)
        return logits_RV

    async def _run(
        self, parts: Sequence[ForwardBatch], deadline_s: float | None, captures: list[RoutingCapture] | None
    ) -> Tensor:
        """All parts through all layers, in turns: in each layer, an earlier part's attention precedes a later one's."""
        with ExitStack() as closing:
            running = []
            for part in parts:
                one = _Microbatch(self.backbone.forward(part, self._kv), self.experts, self.load, deadline_s)
                if captures is not None:
                    one.capture = RoutingCapture()
                    captures.append(one.capture)
                closing.callback(one.close)
                running.append(one)
            for one in running:
                one.begin()
            turn_s = self._clock()
            while any(one.logits_RV is None for one in running):
                for one in running:
                    asked_s = self._clock()
                    answers = await one.answers()
                    now_s = self._clock()
                    self.expert_wait_s += now_s - asked_s
                    if now_s - turn_s > TURN_S:
                        for _ in range(min(MOST_TURNS, int((now_s - turn_s) / TURN_S))):
                            await asyncio.sleep(0)
                        turn_s = self._clock()
                    one.go_on(answers)
            found = [one.logits_RV for one in running if one.logits_RV is not None]
            return found[0] if len(found) == 1 else torch.cat(found)


class _Microbatch:
    """One microbatch on its way through the layers."""

    def __init__(
        self,
        forward: Generator[ExpertCall, Answers, Tensor],
        experts: Experts,
        load: LoadCounter,
        deadline_s: float | None,
    ) -> None:
        self.logits_RV: Tensor | None = None
        self.capture: RoutingCapture | None = None
        self._forward = forward
        self._experts = experts
        self._load = load
        self._deadline_s = deadline_s
        self._work: ExpertWork | None = None

    def begin(self) -> None:
        """The first attention; then the rows are with the experts."""
        self._send(next(self._forward))

    async def answers(self) -> Answers:
        """Of the layer under way."""
        assert self._work is not None, "nothing is under way"
        return await self._work.result()

    def go_on(self, answers: Answers) -> None:
        """The rest of the layer and the next one's attention; after the last layer, the logits."""
        try:
            call = self._forward.send(answers)
        except StopIteration as stop:
            self.logits_RV = stop.value
            return
        self._send(call)

    def close(self) -> None:
        if self._work is not None:
            self._work.abandon()
        self._forward.close()

    def _send(self, call: ExpertCall) -> None:
        self._load.add(call.layer, call.plan.counts)
        if self.capture is not None:
            self.capture.note(call.plan)
        self._work = self._experts.start(call.layer, call.plan, self._deadline_s)
