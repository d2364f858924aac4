"""Answers that say which experts each token took: those that one forward in one process takes, whatever happened."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from actors.coordinator.engine_io import GenerationRequest
from actors.dispatch.remote_experts import ExpertUnavailable
from cluster.prompt_lookup import PromptLookupConfig
from cluster.sequence import FinishReason
from model.sampling.sampler import SamplingParams
from tests.support.checkpoints import write_mixtral
from tests.support.engines import (
    GatedExperts,
    Stories,
    Story,
    TinyModel,
    make_engine,
    request,
    running,
    tell,
    tell_fresh,
)
from tests.support.routing import read_rows, routed_alone, routed_by_transformers

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.MixtralForCausalLM]:
    path = tmp_path_factory.mktemp("routed") / "mixtral"
    return path, write_mixtral(path)


@pytest.fixture(scope="module")
def model(oracle: tuple[Path, transformers.MixtralForCausalLM]) -> TinyModel:
    return TinyModel.load(oracle[0])


def wanting(count: int, seed: int = 0, longest: int = 60, **changes: Any) -> list[GenerationRequest]:
    """Greedy and sampled requests of unequal lengths; every third does not want to know."""
    draw = random.Random(seed)
    made = []
    for index in range(count):
        prompt = [draw.randrange(3, 300) for _ in range(draw.randint(1, longest))]
        sampling = SamplingParams(temperature=0.0 if index % 2 else 0.9, seed=index)
        fields = {"max_tokens": 2 + index % 9, "sampling": sampling, "return_routed_experts": index % 3 != 2}
        made.append(request(prompt, **{**fields, **changes}))
    return made


def check(model: TinyModel, asked: Sequence[GenerationRequest], told: Sequence[Story]) -> None:
    """Every position but the last token's, once, in order, with the experts that it takes alone."""
    for one, story in zip(asked, told, strict=True):
        if not one.return_routed_experts:
            assert story.routed == []
            continue
        known = [*one.prompt_ids, *one.generated_ids, *story.tokens]
        before = len(one.prompt_ids) + len(one.generated_ids) - 1 if one.generated_ids else 0
        expected = routed_alone(model, known[:-1])[before:]
        assert np.array_equal(read_rows(story.routed, model), expected)


async def test_what_one_process_takes(model: TinyModel) -> None:
    asked = wanting(12)
    check(model, asked, await tell_fresh(model, asked))


async def test_what_transformers_takes(model: TinyModel, oracle: tuple[Path, transformers.MixtralForCausalLM]) -> None:
    (one,) = wanting(1, max_tokens=12)
    (story,) = await tell_fresh(model, [one])
    known = [*one.prompt_ids, *story.tokens[:-1]]
    assert np.array_equal(read_rows(story.routed, model), routed_by_transformers(oracle[1], known))


@pytest.mark.parametrize("chunk", [16, 23, 64])
async def test_in_chunks(model: TinyModel, chunk: int) -> None:
    asked = wanting(8, seed=1, longest=150)
    check(model, asked, await tell_fresh(model, asked, chunk=chunk, max_num_seqs=8))


async def test_in_microbatches(model: TinyModel) -> None:
    asked = wanting(8, seed=2)
    check(model, asked, await tell_fresh(model, asked, microbatches=3))


async def test_with_too_few_blocks(model: TinyModel) -> None:
    """Preempted sequences are computed again, and what they took is not told again."""
    asked = wanting(8, seed=3, longest=40, max_tokens=40)
    stories = Stories()
    engine = make_engine(model, stories, num_blocks=8, max_model_len=128)
    async with running(engine):
        told = await tell(engine, stories, asked)
    assert engine.scheduler.counters.preemptions > 0
    check(model, asked, told)


async def test_with_guesses(model: TinyModel) -> None:
    """Guesses that do not come true take experts too; nobody wants to know which."""
    lookup = PromptLookupConfig(tokens=4, ngram_max=3, ngram_min=1, max_batch=4)
    asked = [
        request([5, 6, 7] * 8, 40, return_routed_experts=True),
        request([9, 8] * 9, 30, return_routed_experts=True),
    ]
    stories = Stories()
    engine = make_engine(model, stories, prompt_lookup=lookup)
    async with running(engine):
        told = await tell(engine, stories, asked)
    counters = engine.scheduler.counters
    assert 0 < counters.accepted_draft_tokens < counters.draft_tokens
    check(model, asked, told)


@pytest.mark.parametrize("cut", [1, 2, 7, 11])
async def test_going_on_from_elsewhere(model: TinyModel, cut: int) -> None:
    """The two parts are the whole: nothing twice, nothing missing."""
    (one,) = wanting(1, seed=4, max_tokens=12)
    (whole,) = await tell_fresh(model, [one])
    (rest_of,) = [
        request(
            one.prompt_ids,
            12,
            sampling=one.sampling,
            return_routed_experts=True,
            generated_ids=tuple(whole.tokens[:cut]),
        )
    ]
    (rest,) = await tell_fresh(model, [rest_of])
    assert whole.tokens[:cut] + rest.tokens == whole.tokens
    assert whole.routed[: len(one.prompt_ids) + cut - 1] + rest.routed == whole.routed
    check(model, [rest_of], [rest])


async def test_a_prompt_that_is_only_scored(model: TinyModel) -> None:
    asked = [request(prompt, 0, num_prompt_logprobs=1, return_routed_experts=True) for prompt in ([7], [5, 6, 7, 8, 9])]
    for one, story in zip(asked, await tell_fresh(model, asked), strict=True):
        assert story.finish_reason is FinishReason.LENGTH
        assert np.array_equal(read_rows(story.routed, model), routed_alone(model, one.prompt_ids))


async def test_with_scores_of_the_prompt_they_wait_for_the_first_token(model: TinyModel) -> None:
    asked = wanting(4, seed=5, longest=90, num_prompt_logprobs=1)
    stories = Stories()
    engine = make_engine(model, stories, chunk=16)
    async with running(engine):
        told = await tell(engine, stories, asked)
    check(model, asked, told)
    outputs = [output for call in stories.calls for output in call]
    assert any(output.prompt_logprobs and not output.token_ids for output in outputs)
    assert not any(output.routed_experts for output in outputs if not (output.token_ids or output.finish_reason))


async def test_after_steps_that_came_to_nothing(model: TinyModel) -> None:
    """Steps that wait for an expert, or raise, are computed again."""
    gated = GatedExperts(model.experts)
    gated.errors = [RuntimeError("broken"), ExpertUnavailable(0, 0, "away"), RuntimeError("broken")]
    asked = wanting(5, seed=6)
    stories = Stories()
    engine = make_engine(model, stories, experts=gated)
    async with running(engine):
        told = await tell(engine, stories, asked)
    assert not gated.errors
    check(model, asked, told)


async def test_after_a_step_that_died_while_its_books_were_written(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = wanting(4, seed=7)
    stories = Stories()
    engine = make_engine(model, stories)
    told_of, deaths = engine._output, iter([True, True, False, True])

    def dying(*args: Any) -> Any:
        output = told_of(*args)
        if next(deaths, False):
            raise RuntimeError("died after it had taken what was to be told")
        return output

    monkeypatch.setattr(engine, "_output", dying)
    async with running(engine):
        told = await tell(engine, stories, asked)
    assert engine.counters.failed_steps > 0
    check(model, asked, told)


async def test_nothing_is_kept_for_those_who_do_not_want_it(model: TinyModel) -> None:
    stories = Stories()
    engine = make_engine(model, stories)
    async with running(engine):
        assert engine.routing.begin() is None
        await tell(engine, stories, wanting(3, return_routed_experts=True))
        assert engine.routing.begin() is None, "they have ended"
