"""Going on from "prompt + tokens so far" in another engine: the rest is what it would have been, bit for bit."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.coordinator.engine_io import GenerationRequest
from cluster.prompt_lookup import PromptLookupConfig
from cluster.sequence import FinishReason, SequenceError
from model.sampling.masks import BadWords, OnlyTokens
from model.sampling.sampler import SamplingParams
from tests.support.engines import Stories, Story, TinyModel, make_engine, request, running, tell, tell_fresh
from tests.support.rambling import write_rambling

pytestmark = pytest.mark.anyio

LOOKUP = PromptLookupConfig(tokens=5, ngram_max=3, ngram_min=1, max_batch=64)
PHRASE = [42, 43, 44, 203, 204, 45]
BIAS = ((42, 1.5), (203, -2.0), (45, 0.5))
LENGTH = 24

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy_logprobs": {"num_logprobs": 3},
    "seeded": {"sampling": SamplingParams(temperature=0.8, top_p=0.9, seed=2**64 - 3), "num_logprobs": 1},
    "top_k": {"sampling": SamplingParams(temperature=1.0, top_k=5, min_p=0.01, seed=3)},
    "penalties": {
        "sampling": SamplingParams(
            temperature=0.7, seed=4, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2
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
    "min_tokens": {"min_tokens": 12, "stop_token_ids": frozenset({43, 45, 207}), "num_logprobs": 0},
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path: Path = tmp_path_factory.mktemp("continuation")
    write_rambling(path)
    return TinyModel.load(path)


def cut(one: GenerationRequest, whole: Story, at: int) -> GenerationRequest:
    """The same request after `at` tokens were put out elsewhere."""
    return replace(one, generated_ids=tuple(whole.tokens[:at]))


def check_rest(story: Story, whole: Story, at: int) -> None:
    assert story.tokens == whole.tokens[at:]
    assert story.logprobs == whole.logprobs[at:]
    assert story.finish_reason is whole.finish_reason


async def check_every_cut(model: TinyModel, one: GenerationRequest, **settings: Any) -> Story:
    (whole,) = await tell_fresh(model, [one])
    cuts = range(len(whole.tokens))
    told = await tell_fresh(model, [cut(one, whole, at) for at in cuts], **settings)
    for at, story in zip(cuts, told, strict=True):
        check_rest(story, whole, at)
    return whole


@pytest.mark.parametrize("settings", [{}, {"chunk": 16, "max_num_seqs": 5}, {"prompt_lookup": LOOKUP}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
async def test_every_cut_goes_on_as_if_there_had_been_none(
    model: TinyModel, kind: str, settings: dict[str, Any]
) -> None:
    whole = await check_every_cut(model, request(PHRASE * 3, max_tokens=LENGTH, **KINDS[kind]), **settings)
    assert len(whole.tokens) > 8, "too little to cut"


async def test_guessing_helps_what_goes_on_and_changes_nothing(model: TinyModel) -> None:
    """The guesses are read from the tokens that came from elsewhere, too."""
    one = request(PHRASE * 3, max_tokens=48)
    (whole,) = await tell_fresh(model, [one])
    stories = Stories()
    engine = make_engine(model, stories, prompt_lookup=LOOKUP)
    async with running(engine):
        (story,) = await tell(engine, stories, [cut(one, whole, 30)])
    check_rest(story, whole, 30)
    assert engine.scheduler.counters.accepted_draft_tokens > 0


async def test_few_blocks_and_preemption_change_nothing(model: TinyModel) -> None:
    long = [request([*PHRASE, 5 + index] * 3, 70, num_logprobs=2) for index in range(4)]
    whole = await tell_fresh(model, long)
    stories = Stories()
    engine = make_engine(model, stories, chunk=32, num_blocks=4)
    async with running(engine):
        told = await tell(
            engine, stories, [cut(one, full, 11 * i) for i, (one, full) in enumerate(zip(long, whole, strict=True))]
        )
    for index, (story, full) in enumerate(zip(told, whole, strict=True)):
        check_rest(story, full, 11 * index)
    assert engine.scheduler.counters.preemptions > 0


async def test_a_chain_of_cuts_in_company_is_one_answer(model: TinyModel) -> None:
    """Each engine computes a little and is lost; the last one ends it."""
    draw = random.Random(5)
    kinds = list(KINDS.values())
    requests = [request([9 + i, *PHRASE * 2], LENGTH, **kinds[i % len(kinds)]) for i in range(8)]
    whole = await tell_fresh(model, requests)
    so_far: list[list[int]] = [[] for _ in requests]
    while any(len(kept) < len(full.tokens) for kept, full in zip(so_far, whole, strict=True)):
        open_ones = [i for i, full in enumerate(whole) if len(so_far[i]) < len(full.tokens)]
        going = [replace(requests[i], generated_ids=tuple(so_far[i])) for i in open_ones]
        for i, story in zip(open_ones, await tell_fresh(model, going), strict=True):
            so_far[i] += story.tokens[: draw.randint(1, 9)]
    assert so_far == [full.tokens for full in whole]


async def test_prompt_scores_come_only_where_they_are_asked_for(model: TinyModel) -> None:
    one = request(PHRASE * 3, max_tokens=10, num_prompt_logprobs=2, num_logprobs=1)
    (whole,) = await tell_fresh(model, [one])
    again = cut(one, whole, 4)
    scored, plain = await tell_fresh(model, [again, replace(again, num_prompt_logprobs=None)], chunk=16)
    check_rest(scored, whole, 4)
    check_rest(plain, whole, 4)
    assert scored.prompt_logprobs == whole.prompt_logprobs
    assert plain.prompt_logprobs == []


async def test_stopping_is_judged_over_all_output(model: TinyModel) -> None:
    (free,) = await tell_fresh(model, [request(PHRASE * 3, max_tokens=40)])
    last = free.tokens.index(free.tokens[-1])
    stopping = request(PHRASE * 3, max_tokens=40, stop_token_ids=frozenset({free.tokens[-1]}))
    (story,) = await tell_fresh(model, [cut(stopping, free, last)])
    assert story.tokens == [free.tokens[-1]]
    assert story.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("generated", "complaint"),
    [
        ([7] * 6, r"generated_ids has 6 tokens, but must have fewer than max_tokens \(6\)"),
        ([7, 9, 7], r"generated_ids\[1\] is 9, which ends the sequence"),
        ([7, 2], r"generated_ids\[1\] is 2, which ends"),
    ],
    ids=str,
)
async def test_output_that_had_ended_is_refused(model: TinyModel, generated: Sequence[int], complaint: str) -> None:
    engine = make_engine(model, Stories(), eos_token_ids=(2,))
    wrong = request([5], 6, ignore_eos=False, stop_token_ids=frozenset({9}), generated_ids=tuple(generated))
    with pytest.raises(SequenceError, match=complaint):
        engine.submit(wrong)
    assert not engine.live


async def test_what_min_tokens_forbade_to_end_may_go_on(model: TinyModel) -> None:
    engine = make_engine(model, Stories(), eos_token_ids=(2,))
    engine.submit(request([5], 6, ignore_eos=False, min_tokens=2, generated_ids=(7, 2)))
    assert engine.live.inflight_tokens == 1 + 2 + 4
