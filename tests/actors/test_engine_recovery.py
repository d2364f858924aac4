"""What goes wrong in a step ends nobody's answer but the guilty one's: experts that are away, requests that are
poison, functions that raise. The tokens of everybody else are those of a run without faults.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

import actors.coordinator.engine as engine_module
import actors.coordinator.forward_driver as driver_module
from actors.coordinator.engine import Engine
from actors.coordinator.engine_counters import EngineCounters
from actors.coordinator.engine_io import UNEXPLAINED, GenerationOutput, GenerationRequest
from actors.coordinator.forward_driver import ForwardDriver
from actors.coordinator.live_sequences import LiveSequences
from actors.coordinator.recovery import Recovery
from actors.dispatch.remote_experts import ExpertUnavailable, RowsRejected
from cluster.block_allocator import BlockAllocator
from cluster.fair_queue import FairQueue
from cluster.isolation import Isolation
from cluster.load import LoadCounter
from cluster.microbatching import MicrobatchChooser
from cluster.prompt_lookup import PromptLookup, PromptLookupConfig
from cluster.scheduler import ScheduledBatch, Scheduler
from cluster.sequence import FinishReason, Sequence
from cluster.step_plan import StepPlanner
from cluster.waiting_queue import WaitingQueue
from model.batch import ForwardBatch
from model.sampling.sampler import SamplerState, SamplingParams
from model.transformer import Backbone
from protos.expert_pb2 import STATUS_DEADLINE_EXCEEDED
from tests.support.checkpoints import write_mixtral
from tests.support.engines import (
    AsyncExperts,
    GatedExperts,
    Later,
    Stories,
    TinyModel,
    make_engine,
    request,
    running,
    tell,
    tell_fresh,
)
from tests.support.faults import Fault

pytestmark = pytest.mark.anyio

AWAY = ExpertUnavailable(3, 1, "nobody is there")


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path = tmp_path_factory.mktemp("recovery") / "mixtral"
    write_mixtral(path)
    return TinyModel.load(path)


def crowd() -> list[GenerationRequest]:
    """Greedy, seeded, penalised, scored; of unequal lengths, so that prefills meet decodes."""
    drawn = SamplingParams(temperature=0.9, top_p=0.95, seed=7)
    pushed = SamplingParams(temperature=0.7, seed=8, repetition_penalty=1.3, frequency_penalty=0.4)
    return [
        request([5, 6, 7], 9),
        request([8] * 40, 7, sampling=drawn, num_logprobs=1),
        request([9, 10], 9, sampling=pushed),
        request([11, 12] * 25, 5, num_prompt_logprobs=1),
        request([13], 8, sampling=drawn, num_logprobs=0),
        request([14, 15] * 9, 6, sampling=pushed, num_prompt_logprobs=0, num_logprobs=2),
        request([16] * 5, 3),
    ]


@pytest.fixture(scope="module")
async def undisturbed(model: TinyModel) -> list[tuple[object, ...]]:
    """What each says alone; company changes nothing of it, as `test_engine` proves."""
    return [(await tell_fresh(model, [one]))[0].exact for one in crowd()]


# ---- experts that are away -------------------------------------------------------------------------------


async def test_sequences_wait_for_experts_and_lose_nothing(
    model: TinyModel, undisturbed: list[tuple[object, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    stories = Stories()
    experts = GatedExperts(model.experts)
    engine = make_engine(model, stories, experts=experts, chunk=32)
    async with running(engine):
        told = [stories.of(engine.submit(one)) for one in crowd()]
        await asyncio.wait_for(told[0].first.wait(), 120)
        experts.errors += [AWAY] * 3
        for story in told:
            await asyncio.wait_for(story.done.wait(), 120)
    assert [story.exact for story in told] == undisturbed
    assert (engine.counters.waiting_steps, engine.counters.failed_steps) == (3, 0)
    assert engine.waiting_for == ""
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "nobody is there" in line] == [
        "7 sequences wait: expert 3 in layer 1 is unavailable: nobody is there",
        "no longer waiting: expert 3 in layer 1 is unavailable: nobody is there",
    ], "once each, not per step"


async def test_each_waits_until_its_own_deadline(model: TinyModel) -> None:
    stories = Stories()
    experts = GatedExperts(model.experts)
    engine = make_engine(model, stories, experts=experts)
    (expected,) = await tell_fresh(model, [request([7, 8], 4)])
    experts.error = AWAY
    async with running(engine):
        patient = stories.of(engine.submit(request([7, 8], 4)))
        while not engine.waiting_for:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.001)
        hasty = stories.of(engine.submit(request([5, 6], 4, deadline_s=engine.now() + 0.3)))
        await asyncio.wait_for(hasty.done.wait(), 120)
        assert hasty.finish_reason is FinishReason.EXPIRED
        assert hasty.failure is not None
        assert hasty.failure.status == STATUS_DEADLINE_EXCEEDED
        assert "expert 3 in layer 1 is unavailable: nobody is there" in hasty.failure.text
        assert engine.waiting_for
        engine.scheduler.check_integrity()
        assert not patient.done.is_set()
        experts.error = None
        await asyncio.wait_for(patient.done.wait(), 120)
    assert patient.exact == expected.exact


async def test_who_waits_can_be_cancelled_at_once(model: TinyModel) -> None:
    stories = Stories()
    experts = GatedExperts(model.experts)
    engine = make_engine(model, stories, experts=experts)
    experts.error = AWAY
    async with running(engine):
        waits = engine.submit(request([7, 8], 4))
        await asyncio.wait_for(experts.asked.wait(), 120)
        assert engine.cancel(waits)
        assert engine.scheduler.num_running == 0
        await asyncio.wait_for(engine.live.wait_for_none(), 120)


async def test_rows_carry_the_latest_deadline_of_their_step(model: TinyModel) -> None:
    stories = Stories()
    experts = GatedExperts(model.experts)
    engine = make_engine(model, stories, experts=experts)
    now_s = engine.now()
    async with running(engine):
        await tell(engine, stories, [request([5], 1, deadline_s=now_s + after_s) for after_s in (50, 90)])
        assert [round(one - now_s) for one in experts.deadlines if one is not None] == [90, 90]
        await tell(engine, stories, [request([5], 1), request([6], 1, deadline_s=now_s + 50)])
    assert experts.deadlines[2:] == [None, None], "somebody waits for ever"


async def test_rows_that_replicas_refuse_for_good_fail_their_request_alone(
    model: TinyModel, undisturbed: list[tuple[object, ...]]
) -> None:
    """As when a request's rows are such that no replica takes them."""
    stories = Stories()
    experts = Picky(model.experts, RowsRejected(0, 1, "4 times INVALID: no such rows"))
    engine = make_engine(model, stories, experts=experts)
    async with running(engine):
        experts.poison = 1 + 2 * 60  # the rows of 60 tokens and more are refused
        told = await tell(engine, stories, [*crowd(), request([17] * 70, 4)])
    assert [story.exact for story in told[:7]] == undisturbed
    assert told[7].failure == UNEXPLAINED


class Picky(AsyncExperts):
    """Experts that raise for as many rows as `poison` says, or more."""

    def __init__(self, inner: AsyncExperts, error: Exception) -> None:
        self._inner, self._error = inner, error
        self.poison = 1 << 30

    def start(self, layer: int, plan: Any, deadline_s: float | None = None) -> Later:
        if plan.num_rows >= self.poison:
            raise self._error
        return self._inner.start(layer, plan, deadline_s)


# ---- functions that raise --------------------------------------------------------------------------------


FAULTS: list[tuple[Any, str]] = [
    (Scheduler, "schedule"),
    (Scheduler, "expire"),
    (StepPlanner, "plan"),
    (StepPlanner, "_take"),
    (StepPlanner, "_grow"),
    (StepPlanner, "_admit"),
    (WaitingQueue, "pop"),
    (WaitingQueue, "observe"),
    (WaitingQueue, "head"),
    (WaitingQueue, "note_output"),
    (FairQueue, "head"),
    (FairQueue, "pop"),
    (BlockAllocator, "allocate"),
    (Recovery, "group"),
    (Isolation, "group"),
    (LoadCounter, "roll"),
    (LoadCounter, "add"),
    (engine_module, "build_step"),
    (ForwardBatch, "build"),
    (driver_module, "split_batch"),
    (MicrobatchChooser, "choose"),
    (MicrobatchChooser, "observe"),
    (ForwardDriver, "forward"),
    (Backbone, "forward"),
    (Backbone, "begin"),
    (Backbone, "before_experts"),
    (Backbone, "after_experts"),
    (Backbone, "logits"),
    (AsyncExperts, "start"),
    (AsyncExperts, "_run"),
    (Later, "result"),
    (engine_module, "sample_step"),
    (LiveSequences, "choices"),
    (Scheduler, "postprocess"),
    (Scheduler, "_close"),
    (Scheduler, "_receive"),
    (Scheduler, "_end"),
    (Sequence, "advance"),
    (Sequence, "receive"),
    (BlockAllocator, "free"),
    (SamplerState, "observe"),
    (Engine, "_output"),
    (Engine, "_deadline_s"),
    (engine_module, "GenerationOutput"),
    (EngineCounters, "count_step"),
]


# Sent, and then lost on the way back to the driver: not what a function can do that raises.
SWEEP = [(*fault, after) for fault in FAULTS for after in (False, True) if not (fault[1] == "start" and after)]


@pytest.mark.parametrize(
    ("where", "name", "after"),
    SWEEP,
    ids=[f"{one[0].__name__}.{one[1]}-{'after' if one[2] else 'before'}" for one in SWEEP],
)
async def test_every_function_of_a_step_may_raise_once(
    model: TinyModel,
    undisturbed: list[tuple[object, ...]],
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
    after: bool,
) -> None:
    """In a prefill, and again among decodes; nobody fails, nobody's tokens change, and the engine goes on."""
    fault = Fault(where, name, after=after)
    fault.install(monkeypatch)
    stories = Stories()
    engine = make_engine(model, stories, chunk=32, microbatches=2, max_num_seqs=5, num_blocks=24)
    async with running(engine):
        fault.left = 1
        told = [stories.of(engine.submit(one)) for one in crowd()]
        await asyncio.wait_for(told[0].first.wait(), 120)
        fault.left += 1
        for story in told:
            await asyncio.wait_for(story.done.wait(), 120)
        assert fault.calls > 0, f"{name} is not on the path"
        fault.left = 0
        again = await tell(engine, stories, crowd())
    assert [story.exact for story in told] == undisturbed
    assert [story.exact for story in again] == undisturbed
    assert engine.counters.failed_sequences == 0


POISON = 77
BOUND = 60
"""Steps that raise before the guilty one among eight is found, at most; those that start over take longest."""


def has_poison(sequence: Sequence) -> bool:
    return sequence.prompt_ids[0] == POISON


def in_batch(*args: Any, **_: Any) -> bool:
    (batch,) = [one for one in args if isinstance(one, ScheduledBatch)]
    return any(has_poison(item.sequence) for item in batch.items)


def in_rows(_logits: Any, rows: Any, _choices: Any) -> bool:
    return any(has_poison(one.item.sequence) for one in rows)


def in_tokens(tokens: Any, *_: Any) -> bool:
    return any(list(ids[:2]) == [POISON] * 2 for ids in tokens)


ALWAYS: list[tuple[Any, str, Callable[..., bool], bool]] = [
    (StepPlanner, "_take", lambda _, sequence: has_poison(sequence), False),
    (StepPlanner, "_take", lambda _, sequence: has_poison(sequence), True),
    (engine_module, "build_step", in_batch, False),
    (ForwardBatch, "build", in_tokens, False),
    (Engine, "_deadline_s", in_batch, False),
    (engine_module, "sample_step", in_rows, True),
    (Scheduler, "postprocess", in_batch, False),
    (Scheduler, "postprocess", in_batch, True),
    (Scheduler, "_receive", lambda _, item, __: has_poison(item.sequence), False),
    (Scheduler, "_receive", lambda _, item, __: has_poison(item.sequence), True),
    (Sequence, "advance", lambda one, _: has_poison(one) and one.num_computed > 0, True),
    (Engine, "_output", lambda engine, seq_id, *_: has_poison(engine.live.get(seq_id).sequence), False),
]


@pytest.mark.parametrize(
    ("where", "name", "when", "after"), ALWAYS, ids=[f"{i}-{one[0].__name__}.{one[1]}" for i, one in enumerate(ALWAYS)]
)
async def test_a_request_for_which_a_function_always_raises_fails_alone(
    model: TinyModel,
    undisturbed: list[tuple[object, ...]],
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
    when: Callable[..., bool],
    after: bool,
) -> None:
    fault = Fault(where, name, after=after, when=when)
    fault.install(monkeypatch)
    fault.left = 1 << 30
    stories = Stories()
    engine = make_engine(model, stories, chunk=32, max_num_seqs=8)
    async with running(engine):
        requests = crowd()
        told = await tell(engine, stories, [*requests[:4], request([POISON] * 40, 8), *requests[4:]])
        again = await tell(engine, stories, requests)
    assert told[4].failure == UNEXPLAINED
    assert [story.exact for story in told[:4] + told[5:]] == undisturbed
    assert [story.exact for story in again] == undisturbed
    assert engine.counters.failed_sequences == 1
    assert engine.counters.failed_steps <= BOUND


async def test_where_every_step_raises_everybody_is_told_in_bounded_time(
    model: TinyModel, undisturbed: list[tuple[object, ...]]
) -> None:
    stories = Stories()
    experts = GatedExperts(model.experts)
    engine = make_engine(model, stories, experts=experts)
    async with running(engine):
        experts.error = RuntimeError("a bug")
        told = await tell(engine, stories, crowd())
        assert [story.failure for story in told] == [UNEXPLAINED] * 7
        assert engine.counters.failed_steps <= 3 * 7
        experts.error = None
        again = await tell(engine, stories, crowd())
    assert [story.exact for story in again] == undisturbed


async def test_guesses_are_put_aside_while_somebody_is_tried(
    model: TinyModel, undisturbed: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("propose", "extend"):
        fault = Fault(PromptLookup, name)
        fault.install(monkeypatch)
        fault.left = 2
        lookup = PromptLookupConfig(tokens=3, ngram_max=2, ngram_min=1, max_batch=8)
        told = await tell_fresh(model, crowd(), prompt_lookup=lookup)
        assert [story.exact for story in told] == undisturbed
        assert fault.left == 0


# ---- outputs that cannot be told -------------------------------------------------------------------------


class Moody(Stories):
    """A sink that raises, without having taken anything, where `raises` says so."""

    def __init__(self, raises: Callable[[list[GenerationOutput]], bool]) -> None:
        super().__init__()
        self._raises = raises

    def __call__(self, outputs: Any) -> None:
        if self._raises(list(outputs)):
            raise RuntimeError("a mood")
        super().__call__(outputs)


async def test_a_sink_that_raises_once_loses_nothing(model: TinyModel, undisturbed: list[tuple[object, ...]]) -> None:
    calls = iter(range(1 << 30))
    stories = Moody(lambda outputs: len(outputs) > 1 and next(calls) in (1, 3, 5))
    engine = make_engine(model, stories)
    async with running(engine):
        told = await tell(engine, stories, crowd())
    assert [story.exact for story in told] == undisturbed


async def test_an_output_that_cannot_be_told_is_the_end_of_its_request_alone(
    model: TinyModel, undisturbed: list[tuple[object, ...]]
) -> None:
    stories = Moody(lambda outputs: any(one.seq_id == 1 and one.failure is None for one in outputs))
    engine = make_engine(model, stories)
    async with running(engine):
        told = await tell(engine, stories, crowd())
    assert told[1].failure == UNEXPLAINED
    assert [story.exact for story in (told[0], *told[2:])] == [undisturbed[0], *undisturbed[2:]]


async def test_a_sink_that_never_works_hangs_nobody_up(model: TinyModel) -> None:
    stories = Moody(lambda _: True)
    engine = make_engine(model, stories)
    async with running(engine):
        for one in crowd():
            engine.submit(one)
        await asyncio.wait_for(engine.live.wait_for_none(), 120)
    assert engine.counters.failed_sequences == 7
