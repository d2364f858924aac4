"""Guessing ahead over real tiny checkpoints: fewer steps, and not one bit of any answer changed.

Every test that compares answers also demands that guesses came true, else it would compare nothing.
"""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.coordinator.engine import Engine
from actors.coordinator.engine_io import GenerationOutput, GenerationRequest
from cluster.prompt_lookup import PromptLookupConfig
from cluster.sequence import FinishReason
from model.sampling.masks import BadWords, OnlyTokens
from model.sampling.sampler import SamplingParams
from tests.support.engines import GatedExperts, Stories, Story, TinyModel, make_engine, request, running, tell
from tests.support.rambling import write_rambling

pytestmark = pytest.mark.anyio

LOOKUP = PromptLookupConfig(tokens=5, ngram_max=3, ngram_min=1, max_batch=64)
PHRASE = [42, 43, 44, 203, 204, 45]
BIAS = ((42, 1.5), (203, -2.0), (45, 0.5))


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path: Path = tmp_path_factory.mktemp("speculation")
    write_rambling(path)
    return TinyModel.load(path)


def repetitive_prompts(count: int) -> list[list[int]]:
    draw = random.Random(4)
    return [PHRASE * draw.randint(1, 4) + PHRASE[: draw.randint(1, 5)] for _ in range(count)]


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logprobs": {"num_logprobs": 3},
    "prompt_logprobs": {"num_logprobs": 0, "num_prompt_logprobs": 2},
    "temperature": {"sampling": SamplingParams(temperature=0.6, seed=1), "num_logprobs": 1},
    "top_p": {"sampling": SamplingParams(temperature=0.8, top_p=0.8, seed=2), "num_logprobs": 1},
    "top_k": {"sampling": SamplingParams(temperature=1.0, top_k=5, min_p=0.01, seed=3), "num_logprobs": 1},
    "penalties": {
        "sampling": SamplingParams(
            temperature=0.6, seed=4, repetition_penalty=1.1, presence_penalty=0.3, frequency_penalty=0.2
        ),
        "num_logprobs": 2,
    },
    "greedy_penalties": {"sampling": SamplingParams(temperature=0.0, frequency_penalty=0.4)},
    "bias": {"sampling": SamplingParams(temperature=0.7, seed=5, logit_bias=BIAS), "num_logprobs": 1},
    "masks": {"masks": (OnlyTokens(range(20, 260)), BadWords([PHRASE[1:4], [43]])), "num_logprobs": 1},
    "all_rules": {
        "sampling": SamplingParams(temperature=0.8, seed=6, logit_bias=BIAS, repetition_penalty=1.1),
        "masks": (OnlyTokens(range(20, 260)), BadWords([[203, 204], [44]])),
    },
    "min_tokens": {"min_tokens": 12, "stop_token_ids": frozenset({43, 45, 207}), "num_logprobs": 1},
}


async def run(model: TinyModel, requests: Sequence[GenerationRequest], **settings: Any) -> tuple[list[Story], Engine]:
    stories = Stories()
    engine = make_engine(model, stories, **settings)
    async with running(engine):
        return await tell(engine, stories, requests), engine


async def same_with_and_without(
    model: TinyModel, requests: Sequence[GenerationRequest], **settings: Any
) -> tuple[list[Story], Engine]:
    """Runs both ways and compares; the stories and the engine of the way that guessed."""
    plain, plodding = await run(model, requests, **settings)
    guessed, engine = await run(model, requests, **{"prompt_lookup": LOOKUP, **settings})
    assert [story.exact for story in guessed] == [story.exact for story in plain]
    counters = engine.scheduler.counters
    assert counters.accepted_draft_tokens > 0, "nothing was compared"
    assert counters.accepted_draft_tokens <= counters.draft_tokens
    assert plodding.scheduler.counters.draft_tokens == 0
    assert counters.generated_tokens == plodding.scheduler.counters.generated_tokens
    assert counters.prompt_tokens == plodding.scheduler.counters.prompt_tokens
    return guessed, engine


@pytest.mark.parametrize("kind", KINDS)
async def test_guessing_changes_no_bit_of_a_lone_answer(model: TinyModel, kind: str) -> None:
    one = request(PHRASE * 3, max_tokens=48, **KINDS[kind])
    _, engine = await same_with_and_without(model, [one])
    saved = engine.scheduler.counters.accepted_draft_tokens
    assert engine.counters.steps == engine.scheduler.counters.generated_tokens - saved


def crowd() -> list[GenerationRequest]:
    kinds = list(KINDS.values())
    return [
        request(prompt, max_tokens=20 + index, **kinds[index % len(kinds)])
        for index, prompt in enumerate(repetitive_prompts(18))
    ]


@pytest.mark.parametrize(
    "settings", [{}, {"chunk": 20}, {"max_num_seqs": 3, "chunk": 32}, {"num_blocks": 6, "chunk": 64}], ids=str
)
async def test_guessing_changes_no_bit_in_a_crowd(model: TinyModel, settings: dict[str, int]) -> None:
    await same_with_and_without(model, crowd(), **settings)


async def test_guessing_in_company_says_what_each_says_alone_without(model: TinyModel) -> None:
    alone = [(await run(model, [one]))[0][0].exact for one in crowd()]
    together, engine = await run(model, crowd(), prompt_lookup=LOOKUP)
    assert [story.exact for story in together] == alone
    assert engine.scheduler.counters.accepted_draft_tokens > 0


async def test_guessing_with_too_few_blocks_changes_no_bit(model: TinyModel) -> None:
    """Sequences are preempted with guessed tokens behind them, and start over."""
    long = [request([*PHRASE, 5 + index] * 3, 70, num_logprobs=2, num_prompt_logprobs=1) for index in range(4)]
    _, engine = await same_with_and_without(model, long, chunk=64, num_blocks=4)
    assert engine.scheduler.counters.preemptions > 0


async def test_a_half_precision_model_with_a_window_keeps_every_bit(tmp_path: Path) -> None:
    write_rambling(tmp_path, dtype=torch.float16, sliding_window=24)
    await same_with_and_without(TinyModel.load(tmp_path), crowd()[:8], chunk=32)


async def test_an_answer_ends_at_the_same_token_wherever_its_limit_cuts_a_guess(model: TinyModel) -> None:
    (free,), _ = await run(model, [request(PHRASE * 3, max_tokens=30)])
    limited = [request(PHRASE * 3, max_tokens=limit) for limit in range(1, 31)]
    told, _ = await same_with_and_without(model, limited)
    for limit, story in enumerate(told, start=1):
        assert story.tokens == free.tokens[:limit]
        assert story.finish_reason is FinishReason.LENGTH


async def test_an_answer_stops_at_the_same_token_wherever_a_stop_token_cuts_a_guess(model: TinyModel) -> None:
    (free,), _ = await run(model, [request(PHRASE * 3, max_tokens=40)])
    stops = sorted(set(free.tokens))
    stopping = [
        request(PHRASE * 3, max_tokens=40, stop_token_ids=frozenset({stop}), min_tokens=least)
        for stop in stops
        for least in (0, 6, 25)
    ]
    told, _ = await same_with_and_without(model, stopping, max_num_seqs=4)
    for one, story in zip(stopping, told, strict=True):
        (stop,) = one.stop_token_ids
        if stop in story.tokens:
            assert story.tokens.index(stop) == len(story.tokens) - 1 >= one.min_tokens
            assert story.finish_reason is FinishReason.STOP


async def test_the_end_of_sequence_and_the_longest_sequence_end_it_too(model: TinyModel) -> None:
    (free,), _ = await run(model, [request(PHRASE * 3, max_tokens=40)])
    eos = free.tokens[-1]
    requests = [request(PHRASE * 3, max_tokens=400, ignore_eos=ignore) for ignore in (True, False)]
    told, _ = await same_with_and_without(model, requests, max_model_len=60, eos_token_ids=(eos,))
    assert told[0].finish_reason is FinishReason.LENGTH
    assert len(told[0].tokens) == 60 - len(PHRASE * 3)
    assert told[1].tokens == free.tokens[: free.tokens.index(eos) + 1]


async def test_several_tokens_come_in_one_output_with_their_logprobs(model: TinyModel) -> None:
    stories = Stories()
    engine = make_engine(model, stories, prompt_lookup=LOOKUP)
    async with running(engine):
        await tell(engine, stories, [request(PHRASE * 3, max_tokens=48, num_logprobs=1)])
    outputs = [output for call in stories.calls for output in call]
    assert max(len(output.token_ids) for output in outputs) == LOOKUP.tokens + 1
    for output in outputs:
        assert [place.chosen.token for place in output.logprobs] == list(output.token_ids)


async def test_nothing_is_guessed_while_many_run(model: TinyModel) -> None:
    few = PromptLookupConfig(tokens=5, ngram_max=3, ngram_min=1, max_batch=2)
    requests = [request(PHRASE * 3, max_tokens=24) for _ in range(3)]
    _, engine = await run(model, requests, prompt_lookup=few)
    assert engine.scheduler.counters.draft_tokens == 0
    _, engine = await run(model, requests[:2], prompt_lookup=few)
    assert engine.scheduler.counters.draft_tokens > 0


async def test_who_leaves_in_the_middle_of_a_guess_disturbs_nobody(model: TinyModel) -> None:
    staying = request(PHRASE * 3, max_tokens=60, num_logprobs=1)
    (expected,), _ = await run(model, [staying])
    stories = Stories()
    guessed = asyncio.Event()

    def sink(outputs: Sequence[GenerationOutput]) -> None:
        stories(outputs)
        if min(len(output.token_ids) for output in outputs) > 1:
            guessed.set()

    experts = GatedExperts(model.experts)
    engine = make_engine(model, sink, experts=experts, prompt_lookup=LOOKUP)
    async with running(engine):
        leaves = engine.submit(request(PHRASE * 3, max_tokens=400))
        stays = stories.of(engine.submit(staying))
        async with asyncio.timeout(120):
            await guessed.wait()
            experts.gate.clear()
            experts.asked.clear()
            await experts.asked.wait()
            assert stays.finish_reason is None
            engine.cancel(leaves)
            experts.gate.set()
            await stays.done.wait()
    assert stays.exact == expected.exact
    assert stories.of(leaves).finish_reason is FinishReason.CANCELLED


async def test_a_step_that_fails_with_guesses_in_it_leaves_no_block_behind(model: TinyModel) -> None:
    stories = Stories()
    experts = GatedExperts(model.experts)
    engine = make_engine(model, stories, experts=experts, prompt_lookup=LOOKUP)
    async with running(engine):
        hit = stories.of(engine.submit(request(PHRASE * 3, max_tokens=100)))
        async with asyncio.timeout(120):
            await hit.first.wait()
            experts.errors.append(RuntimeError("a bug"))
            await hit.done.wait()
        (again,) = await tell(engine, stories, [request(PHRASE * 3, max_tokens=100)])
    assert engine.counters.failed_steps == 1
    assert hit.exact == again.exact
