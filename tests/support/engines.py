"""A real engine over a tiny checkpoint in this process: real backbone, real experts behind an async face."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from actors.coordinator.engine import Engine
from actors.coordinator.engine_io import Failure, GenerationOutput, GenerationRequest
from actors.coordinator.forward_driver import Experts, ForwardDriver
from actors.coordinator.sequence_traces import SequenceTraces
from cluster.ids import SequenceId
from cluster.load import LoadCounter
from cluster.microbatching import MicrobatchChooser, MicrobatchPolicy
from cluster.prompt_lookup import PromptLookupConfig
from cluster.scheduler import Scheduler, SchedulerConfig
from cluster.sequence import FinishReason
from model.dispatch import Answers, DispatchPlan
from model.experts import LocalExperts
from model.kv_cache import KVCache, default_kv_dtype
from model.sampling.sampler import PositionLogprobs, SamplingParams
from model.storage.checkpoint import Checkpoint
from model.transformer import Backbone, load_local

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Later:
    """Rows that somebody computes when they are awaited."""

    work: Coroutine[Any, Any, Answers]

    async def result(self) -> Answers:
        return await self.work

    def abandon(self) -> None:
        self.work.close()


class AsyncExperts:
    """Local experts that give the loop a turn before every answer, as remote ones do."""

    def __init__(self, local: LocalExperts) -> None:
        self._local = local

    def start(self, layer: int, plan: DispatchPlan, deadline_s: float | None = None) -> Later:
        return Later(self._run(layer, plan))

    async def _run(self, layer: int, plan: DispatchPlan) -> Tensor:
        await asyncio.sleep(0)
        return self._local.run(layer, plan)


class GatedExperts:
    """Experts that answer only while `gate` is set, and raise the next of `errors`, or `error` while there is one.

    After `shuts_after` answers the gate shuts by itself: what is to be seen in the middle of an answer is there to be
    seen, however fast the machine and however late whoever looks.
    """

    def __init__(self, inner: Experts, shuts_after: int | None = None) -> None:
        self.inner = inner
        self.shuts_after = shuts_after
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()
        self.errors: list[Exception] = []
        self.error: Exception | None = None
        self.deadlines: list[float | None] = []

    def open(self) -> None:
        """For good."""
        self.shuts_after = None
        self.gate.set()

    def start(self, layer: int, plan: DispatchPlan, deadline_s: float | None = None) -> Later:
        self.deadlines.append(deadline_s)
        return Later(self._run(layer, plan))

    async def _run(self, layer: int, plan: DispatchPlan) -> Answers:
        self.asked.set()
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop()
        if self.error is not None:
            raise self.error
        if self.shuts_after is not None:
            self.shuts_after -= 1
            if self.shuts_after == 0:
                self.gate.clear()
        return await self.inner.start(layer, plan).result()


@dataclass
class TinyModel:
    """A loaded tiny checkpoint."""

    path: Path
    backbone: Backbone
    local: LocalExperts

    @classmethod
    def load(cls, path: Path, kernel: str | None = None, device: str = "cpu") -> "TinyModel":
        backbone, local = load_local(Checkpoint.open(path), kernel, device)
        return cls(path, backbone, local)

    @property
    def experts(self) -> AsyncExperts:
        return AsyncExperts(self.local)


@dataclass
class Story:
    """All that was told of one sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    routed: list[bytes] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    failure: Failure | None = None
    num_outputs: int = 0
    num_cached: int = 0
    done: asyncio.Event = field(default_factory=asyncio.Event)
    first: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def exact(self) -> tuple[list[int], list[PositionLogprobs], list[PositionLogprobs], FinishReason | None]:
        """What must not depend on anything but the request: equal floats are equal bits."""
        return self.tokens, self.logprobs, self.prompt_logprobs, self.finish_reason


class Stories:
    """A sink that keeps everything, by sequence."""

    def __init__(self) -> None:
        self.by_id: dict[SequenceId, Story] = {}
        self.calls: list[list[GenerationOutput]] = []

    def __call__(self, outputs: Sequence[GenerationOutput]) -> None:
        self.calls.append(list(outputs))
        for output in outputs:
            story = self.of(output.seq_id)
            assert story.finish_reason is None, f"{output} came after the end"
            story.num_outputs += 1
            story.tokens += output.token_ids
            story.logprobs += output.logprobs
            story.prompt_logprobs += output.prompt_logprobs
            story.routed += output.routed_experts
            story.num_cached = output.num_cached_tokens
            story.finish_reason = output.finish_reason
            story.failure = output.failure
            story.first.set()
            if output.finish_reason is not None:
                story.done.set()

    def of(self, seq_id: SequenceId) -> Story:
        return self.by_id.setdefault(seq_id, Story())


def make_engine(
    model: TinyModel,
    sink: Callable[[Sequence[GenerationOutput]], None],
    *,
    experts: Experts | None = None,
    num_blocks: int = 256,
    chunk: int = 512,
    max_num_seqs: int = 16,
    max_waiting_requests: int = 256,
    max_model_len: int = 512,
    eos_token_ids: Sequence[int] | None = None,
    microbatches: int | None = None,
    prompt_lookup: PromptLookupConfig | None = None,
    prefix_caching: bool = True,
    alarms: Callable[[], int] = lambda: 0,
    traces: SequenceTraces | None = None,
) -> Engine:
    """An engine that does not run yet; blocks of 32 tokens."""
    config = model.backbone.config
    scheduler_config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=chunk,
        block_size=32,
        max_waiting_requests=max_waiting_requests,
        max_waiting_tokens=1 << 16,
        max_model_len=max_model_len,
        prompt_lookup=prompt_lookup,
        prefix_caching=prefix_caching,
    )
    device = model.backbone.device
    kv = KVCache(config, num_blocks, 32, default_kv_dtype(device), device)
    load = LoadCounter(config.num_layers, config.num_experts)
    fixed = None if microbatches is None else MicrobatchPolicy(choices=(microbatches,), min_tokens=microbatches)
    chooser = None if fixed is None else MicrobatchChooser(fixed)
    return Engine(
        driver=ForwardDriver(model.backbone, kv, experts or model.experts, load, chooser),
        scheduler=Scheduler(scheduler_config, num_blocks),
        eos_token_ids=config.eos_token_ids if eos_token_ids is None else eos_token_ids,
        sink=sink,
        alarms=alarms,
        traces=traces,
    )


@contextlib.asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[asyncio.Task[None]]:
    """Runs the engine's loop for the length of the block, and audits its books at the end."""
    task = asyncio.create_task(engine.run())
    try:
        yield task
    finally:
        task.cancel()
        results = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError), results[0]
        engine.scheduler.check_integrity()
        assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


def request(prompt: Sequence[int], max_tokens: int = 8, **changes: Any) -> GenerationRequest:
    """A greedy request that does not stop early, unless `changes` say otherwise."""
    fields: dict[str, Any] = {"sampling": GREEDY, "ignore_eos": True, **changes}
    return GenerationRequest(prompt_ids=tuple(prompt), max_tokens=max_tokens, **fields)


async def tell(engine: Engine, stories: Stories, requests: Sequence[GenerationRequest]) -> list[Story]:
    """Submits all at once to a running engine and waits until all have ended."""
    told = [stories.of(engine.submit(one)) for one in requests]
    for story in told:
        await asyncio.wait_for(story.done.wait(), 200)
    return told


async def tell_fresh(model: TinyModel, requests: Sequence[GenerationRequest], **settings: Any) -> list[Story]:
    """`tell` in an engine of its own."""
    stories = Stories()
    engine = make_engine(model, stories, **settings)
    async with running(engine):
        return await tell(engine, stories, requests)
