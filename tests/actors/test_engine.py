"""The engine over real tiny checkpoints: exact against transformers, exact under any batching, and hard to kill."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from actors.coordinator.engine_io import EXPIRED, STOPPED, GenerationRequest
from actors.coordinator.live_sequences import LiveSequences
from cluster.scheduler import QueueFull, RequestTooLong
from cluster.sequence import FinishReason, SequenceError, SequenceStatus
from model.sampling.sampler import SamplingParams
from protos.expert_pb2 import STATUS_INTERNAL
from tests.support.checkpoints import write_mixtral
from tests.support.engines import (
    GatedExperts,
    Stories,
    TinyModel,
    make_engine,
    request,
    running,
    tell,
    tell_fresh,
)

pytestmark = pytest.mark.anyio

VOCAB = 300


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.MixtralForCausalLM]:
    path = tmp_path_factory.mktemp("engine") / "mixtral"
    return path, write_mixtral(path)


@pytest.fixture(scope="module")
def model(oracle: tuple[Path, transformers.MixtralForCausalLM]) -> TinyModel:
    return TinyModel.load(oracle[0])


def prompts(count: int, seed: int = 0, longest: int = 48) -> list[list[int]]:
    """Random prompts of 1 to `longest` tokens, without special ids."""
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def mixed_requests(count: int = 32) -> list[GenerationRequest]:
    """Greedy and sampled, with and without penalties and log-probabilities, of very unequal lengths."""
    requests = []
    for index, prompt in enumerate(prompts(count, seed=1)):
        sampling = SamplingParams(
            temperature=0.0 if index % 3 == 0 else 0.9,
            top_p=0.95,
            top_k=40 if index % 2 else 0,
            seed=1000 + index,
            repetition_penalty=1.2 if index % 5 == 0 else 1.0,
            frequency_penalty=0.5 if index % 7 == 0 else 0.0,
        )
        requests.append(
            request(
                prompt,
                max_tokens=2 + index % 7,
                sampling=sampling,
                num_logprobs=index % 4,
                num_prompt_logprobs=2 if index % 4 == 1 else None,
            )
        )
    return requests


def reference_tokens(reference: transformers.MixtralForCausalLM, prompt: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    model: Any = reference
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(out[0, len(prompt) :].tolist())


async def test_greedy_tokens_are_those_of_transformers(
    model: TinyModel, oracle: tuple[Path, transformers.MixtralForCausalLM]
) -> None:
    chosen = prompts(8, seed=3)
    told = await tell_fresh(model, [request(prompt, max_tokens=20) for prompt in chosen], chunk=64)
    for prompt, story in zip(chosen, told, strict=True):
        assert story.tokens == reference_tokens(oracle[1], prompt, 20)
        assert story.finish_reason is FinishReason.LENGTH


async def test_prompt_logprobs_are_those_of_transformers(
    model: TinyModel, oracle: tuple[Path, transformers.MixtralForCausalLM]
) -> None:
    prompt = prompts(1, seed=5, longest=90)[0] * 2
    one = request(prompt, max_tokens=0, num_prompt_logprobs=3)
    (story,) = await tell_fresh(model, [one], chunk=16)
    with torch.no_grad():
        logits = oracle[1](torch.tensor([prompt])).logits[0].float()
    expected = torch.log_softmax(logits, dim=-1)
    assert story.tokens == []
    assert story.finish_reason is FinishReason.LENGTH
    assert len(story.prompt_logprobs) == len(prompt) - 1
    for position, place in enumerate(story.prompt_logprobs):
        assert place.chosen.token == prompt[position + 1]
        assert place.chosen.logprob == pytest.approx(expected[position, prompt[position + 1]].item(), abs=1e-4)
        assert [one.token for one in place.top] == expected[position].topk(3).indices.tolist()


async def test_a_prompt_of_one_token_is_scored_with_nothing(model: TinyModel) -> None:
    (story,) = await tell_fresh(model, [request([7], max_tokens=0, num_prompt_logprobs=1)])
    assert story.exact == ([], [], [], FinishReason.LENGTH)


@pytest.fixture(scope="module")
async def alone(model: TinyModel) -> list[tuple[object, ...]]:
    """Each request by itself, one after the other: what all crowds must reproduce bit for bit."""
    stories = Stories()
    engine = make_engine(model, stories)
    async with running(engine):
        return [(await tell(engine, stories, [one]))[0].exact for one in mixed_requests()]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 32, "chunk": 512},
        {"max_num_seqs": 32, "chunk": 64},
        {"max_num_seqs": 16, "chunk": 16},
        {"max_num_seqs": 32, "chunk": 64, "microbatches": 2},
        {"max_num_seqs": 32, "chunk": 128, "microbatches": 3},
    ],
    ids=str,
)
async def test_a_crowd_changes_no_bit(
    model: TinyModel, alone: list[tuple[object, ...]], settings: dict[str, int]
) -> None:
    told = await tell_fresh(model, mixed_requests(), **settings)
    assert [story.exact for story in told] == alone


async def test_a_crowd_changes_no_bit_of_a_half_precision_model(tmp_path: Path) -> None:
    """Packed fp16 weights are the default kernel of real checkpoints; here with a sliding window as well."""
    write_mixtral(tmp_path, dtype=torch.float16, sliding_window=24)
    model = TinyModel.load(tmp_path)
    requests = mixed_requests(8)
    stories = Stories()
    engine = make_engine(model, stories)
    async with running(engine):
        expected = [(await tell(engine, stories, [one]))[0].exact for one in requests]
    told = await tell_fresh(model, requests, chunk=32)
    assert [story.exact for story in told] == expected


async def test_preemption_changes_no_bit(model: TinyModel) -> None:
    """KV blocks for a quarter of what the sequences need at once: who finds none starts over."""
    drawn = [SamplingParams(temperature=0.8, seed=index) for index in range(4)]
    long = [
        request([5 + index] * 20, 60, sampling=one, num_logprobs=2, num_prompt_logprobs=1)
        for index, one in enumerate(drawn)
    ]
    expected = [(await tell_fresh(model, [one]))[0].exact for one in long]
    stories = Stories()
    engine = make_engine(model, stories, chunk=64, num_blocks=3)  # each needs them all
    async with running(engine):
        told = await tell(engine, stories, long)
    assert [story.exact for story in told] == expected
    assert engine.scheduler.counters.preemptions > 0
    assert engine.scheduler.counters.recomputed_tokens > 0


async def test_a_request_that_comes_later_changes_no_bit(model: TinyModel, alone: list[tuple[object, ...]]) -> None:
    """Requests come one by one while others run, and some go away again."""
    stories = Stories()
    engine = make_engine(model, stories, chunk=32)
    async with running(engine):
        told = []
        for index, one in enumerate(mixed_requests()):
            told.append(stories.of(engine.submit(one)))
            passer_by = engine.submit(request([9] * 40, max_tokens=200))
            for _ in range(index % 5):
                await asyncio.sleep(0)
            engine.cancel(passer_by)
        for story in told:
            await asyncio.wait_for(story.done.wait(), 120)
    assert [story.exact for story in told] == alone


async def test_a_stop_token_ends_a_sequence_and_min_tokens_puts_it_off(model: TinyModel) -> None:
    prompt = prompts(1, seed=11)[0]
    (free,) = await tell_fresh(model, [request(prompt, max_tokens=12)])
    stop = free.tokens[5]
    first = free.tokens.index(stop)
    ended, put_off = await tell_fresh(
        model,
        [
            request(prompt, max_tokens=12, stop_token_ids=frozenset({stop})),
            request(prompt, max_tokens=12, stop_token_ids=frozenset({stop}), min_tokens=8),
        ],
    )
    assert ended.tokens == free.tokens[: first + 1]
    assert ended.finish_reason is FinishReason.STOP
    assert stop not in put_off.tokens[:8]
    assert put_off.tokens[:first] == free.tokens[:first]


async def test_an_end_of_sequence_token_stops_unless_it_is_ignored(model: TinyModel) -> None:
    (free,) = await tell_fresh(model, [request([5, 6], max_tokens=9)], eos_token_ids=())
    eos = free.tokens[4]
    both = [request([5, 6], max_tokens=9, ignore_eos=ignore) for ignore in (False, True)]
    ended, ignoring = await tell_fresh(model, both, eos_token_ids=(eos,))
    assert ended.tokens == free.tokens[: free.tokens.index(eos) + 1]
    assert ended.finish_reason is FinishReason.STOP
    assert ignoring.tokens == free.tokens


async def test_every_step_tells_all_its_sequences_at_once(model: TinyModel) -> None:
    stories = Stories()
    engine = make_engine(model, stories)
    async with running(engine):
        await tell(engine, stories, [request([5, 6, 7], max_tokens=4) for _ in range(3)])
    assert [len(call) for call in stories.calls] == [3, 3, 3, 3]


async def test_the_oldest_request_that_has_not_begun_says_how_long_the_queue_is() -> None:
    live = LiveSequences(frozenset())
    assert live.queue_s(5.0) == 0
    first, second = (live.prepare(request([5, 6])) for _ in range(2))
    live.keep(first, 10.0, lambda: None)
    live.keep(second, 12.0, lambda: None)
    assert live.queue_s(13.0) == 3.0
    first.sequence.status = SequenceStatus.RUNNING
    assert live.queue_s(13.0) == 1.0
    second.sequence.status = SequenceStatus.RUNNING
    assert live.queue_s(13.0) == 0
    first.sequence.status, first.sequence.num_preemptions = SequenceStatus.WAITING, 1
    assert live.queue_s(13.0) == 0, "it has begun"


async def test_what_is_counted_adds_up(model: TinyModel) -> None:
    stories = Stories()
    engine = make_engine(model, stories, chunk=32)
    requests = [request(prompt, max_tokens=6) for prompt in prompts(5, seed=8)]
    async with running(engine):
        await tell(engine, stories, requests)
    computed = sum(len(one.prompt_ids) + one.max_tokens - 1 for one in requests)
    assert engine.scheduler.counters.prompt_tokens == sum(len(one.prompt_ids) for one in requests)
    assert engine.scheduler.counters.generated_tokens == 30
    assert engine.load.total.sum(axis=1).tolist() == [computed * 2] * 2  # top-2 in each of two layers
    assert engine.load.window.load.sum() == engine.load.total.sum()
    assert engine.counters.steps == engine.scheduler.counters.steps == len(engine.counters.recent_step_s)
    assert 0 < engine.counters.expert_wait_s < engine.counters.step_s


async def test_an_idle_engine_sleeps_and_wakes(model: TinyModel) -> None:
    stories = Stories()
    engine = make_engine(model, stories)
    async with running(engine):
        await tell(engine, stories, [request([5], max_tokens=2)])
        steps = engine.counters.steps
        for _ in range(20):
            await asyncio.sleep(0)
        assert engine.counters.steps == steps
        await tell(engine, stories, [request([5], max_tokens=2)])
        assert engine.counters.steps == steps + 2


async def test_a_refused_request_leaves_nothing_behind(model: TinyModel) -> None:
    stories = Stories()
    engine = make_engine(model, stories, max_waiting_requests=2, max_model_len=64)
    with pytest.raises(RequestTooLong, match="max_model_len is 64"):
        engine.submit(request([5] * 64))
    with pytest.raises(SequenceError, match="prompt_ids is empty"):
        engine.submit(request([]))
    engine.submit(request([5], max_tokens=1))
    engine.submit(request([5], max_tokens=1))
    with pytest.raises(QueueFull) as full:
        engine.submit(request([5], max_tokens=1))
    assert full.value.retry_after_s >= 1
    assert len(engine.live) == 2
    async with running(engine):
        await asyncio.wait_for(engine.live.wait_for_none(), 120)
    assert [story.finish_reason for story in stories.by_id.values()] == [FinishReason.LENGTH] * 2


async def test_cancelling_gives_back_blocks_and_places_at_once(model: TinyModel) -> None:
    stories = Stories()
    engine = make_engine(model, stories, max_num_seqs=1)
    async with running(engine):
        runs = engine.submit(request([5] * 40, max_tokens=400))
        waits = engine.submit(request([6] * 40, max_tokens=4))
        await asyncio.wait_for(stories.of(runs).first.wait(), 120)
        assert engine.scheduler.num_waiting == 1
        assert engine.cancel(waits)
        assert engine.scheduler.num_waiting == 0
        assert stories.of(waits).finish_reason is FinishReason.CANCELLED
        assert engine.cancel(runs)
        assert not engine.cancel(runs)
        assert engine.scheduler.num_running == 0
        await tell(engine, stories, [request([7] * 40, max_tokens=4)])
    assert stories.of(runs).finish_reason is FinishReason.CANCELLED


async def test_a_step_that_nobody_wants_any_more_is_given_up(model: TinyModel) -> None:
    """The experts hang; their only askers go away; the next request is served without waiting for them."""
    stories = Stories()
    experts = GatedExperts(model.experts)
    experts.gate.clear()
    engine = make_engine(model, stories, experts=experts)
    async with running(engine):
        hung = [engine.submit(request([5, 6], max_tokens=4)) for _ in range(2)]
        await asyncio.wait_for(experts.asked.wait(), 120)
        engine.cancel(hung[0])
        for _ in range(5):
            await asyncio.sleep(0)
        assert engine.counters.dropped_steps == 0, "one asker is still there"
        engine.cancel(hung[1])
        for _ in range(5):
            await asyncio.sleep(0)
        assert engine.counters.dropped_steps == 1
        engine.scheduler.check_integrity()
        experts.gate.set()
        (story,) = await tell(engine, stories, [request([5, 6], max_tokens=4)])
    (expected,) = await tell_fresh(model, [request([5, 6], max_tokens=4)])
    assert story.exact == expected.exact


async def test_a_sequence_cancelled_in_mid_step_does_not_disturb_the_step(model: TinyModel) -> None:
    (expected,) = await tell_fresh(model, [request([8, 9], max_tokens=4)])
    stories = Stories()
    experts = GatedExperts(model.experts)
    experts.gate.clear()
    engine = make_engine(model, stories, experts=experts)
    async with running(engine):
        leaves = engine.submit(request([5, 6], max_tokens=4))
        stays = stories.of(engine.submit(request([8, 9], max_tokens=4)))
        await asyncio.wait_for(experts.asked.wait(), 120)
        engine.cancel(leaves)
        experts.gate.set()
        await asyncio.wait_for(stays.done.wait(), 120)
    assert stays.exact == expected.exact
    assert stories.of(leaves).tokens == []


async def test_a_deadline_ends_a_request_even_while_the_experts_hang(model: TinyModel) -> None:
    stories = Stories()
    experts = GatedExperts(model.experts)
    experts.gate.clear()
    engine = make_engine(model, stories, experts=experts)
    async with running(engine):
        late = stories.of(engine.submit(request([5], deadline_s=engine.now() + 0.05)))
        await asyncio.wait_for(late.done.wait(), 120)
        assert late.finish_reason is FinishReason.EXPIRED
        assert late.failure == EXPIRED
        experts.gate.set()
        (fine,) = await tell(engine, stories, [request([5], max_tokens=2, deadline_s=engine.now() + 60)])
        assert fine.finish_reason is FinishReason.LENGTH


async def test_a_deadline_that_is_already_over_is_told_without_a_step(model: TinyModel) -> None:
    stories = Stories()
    engine = make_engine(model, stories)
    async with running(engine):
        (late,) = await tell(engine, stories, [request([5], deadline_s=engine.now() - 1)])
    assert late.failure == EXPIRED
    assert engine.counters.steps == 0


def with_poisoned_token(path: Path) -> TinyModel:
    write_mixtral(path)
    (weights,) = path.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][299] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    return TinyModel.load(path)


async def test_logits_that_are_no_numbers_fail_one_sequence_and_spoil_no_block(tmp_path: Path) -> None:
    """Token 299's embedding is NaN: its sequence fails; its neighbours, and who gets its blocks next, are exact."""
    model = with_poisoned_token(tmp_path)
    healthy = [request([5 + index] * 70, max_tokens=6, num_logprobs=1) for index in range(3)]
    expected = [(await tell_fresh(model, [one]))[0].exact for one in healthy]

    stories = Stories()
    engine = make_engine(model, stories, num_blocks=12, chunk=64)
    async with running(engine):
        poisoned = request([299] * 70, max_tokens=6)
        scored = request([299, 5, 6], max_tokens=0, num_prompt_logprobs=1)
        told = await tell(engine, stories, [healthy[0], poisoned, healthy[1], scored])
        assert [told[0].exact, told[2].exact] == expected[:2]
        for story in (told[1], told[3]):
            assert story.finish_reason is FinishReason.ERROR
            assert story.failure is not None
            assert story.failure.status == STATUS_INTERNAL
            assert "logits are not a distribution" in story.failure.text
        for _ in range(4):  # every block that held a NaN is used again
            again = await tell(engine, stories, healthy)
            assert [story.exact for story in again] == expected
    assert engine.counters.failed_steps == 0


async def test_stopping_tells_everybody_and_frees_everything(model: TinyModel) -> None:
    stories = Stories()
    engine = make_engine(model, stories, max_num_seqs=1)
    async with running(engine):
        told = [stories.of(engine.submit(request([5], max_tokens=400))) for _ in range(3)]
        await asyncio.wait_for(told[0].first.wait(), 120)
    assert [story.failure for story in told] == [STOPPED] * 3
    assert len(engine.live) == 0


async def test_books_that_do_not_add_up_stop_the_engine(model: TinyModel) -> None:
    stories = Stories()
    engine = make_engine(model, stories)
    task = asyncio.create_task(engine.run())
    engine.scheduler.blocks.allocate(1)  # a block that no sequence holds
    engine.submit(request([5], max_tokens=1))
    with pytest.raises(AssertionError, match=r"block \d+ has 0 owners"):
        await asyncio.wait_for(task, 120)
