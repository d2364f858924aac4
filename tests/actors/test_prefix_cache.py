"""The KV cache shared by prefix, in real engines: what is found there changes no token and no bit of a logprob."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from actors.coordinator.engine import Engine
from actors.coordinator.engine_io import GenerationRequest
from cluster.prefix_hash import root_key
from cluster.prompt_lookup import PromptLookupConfig
from cluster.sequence import FinishReason
from model.dispatch import Answers, DispatchPlan
from model.sampling.sampler import SamplingParams
from tests.support.checkpoints import write_mixtral
from tests.support.engines import (
    AsyncExperts,
    GatedExperts,
    Later,
    Stories,
    Story,
    TinyModel,
    make_engine,
    request,
    running,
    tell,
)

pytestmark = pytest.mark.anyio

VOCAB = 300
BLOCK = 32


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prefix") / "mixtral"
    write_mixtral(path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> TinyModel:
    return TinyModel.load(checkpoint)


def ids(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, VOCAB) for _ in range(count)]


def conversations(count: int = 9) -> list[GenerationRequest]:
    """Three beginnings, of 100 tokens and more, that go on in different ways, sampled in different ways."""
    found = []
    for index in range(count):
        prompt = ids(100 + 10 * (index % 3), index % 3) + ids(3 + 11 * (index // 3), 50 + index)
        sampling = SamplingParams(temperature=0.0 if index % 2 else 0.9, top_p=0.95, seed=index)
        scores = 2 if index == 4 else None
        found.append(request(prompt, 3 + index, sampling=sampling, num_logprobs=2, num_prompt_logprobs=scores))
    return found


async def tell_all(engine: Engine, stories: Stories, requests: Sequence[GenerationRequest], waves: int) -> list[Story]:
    """In so many waves, of requests that run side by side."""
    size = -(-len(requests) // waves)
    told: list[Story] = []
    for start in range(0, len(requests), size):
        told += await tell(engine, stories, requests[start : start + size])
    return told


async def without_cache(model: TinyModel, requests: Sequence[GenerationRequest]) -> list[Story]:
    """Each alone, whole, from its first token."""
    stories = Stories()
    engine = make_engine(model, stories, prefix_caching=False)
    async with running(engine):
        told = await tell_all(engine, stories, requests, waves=len(requests))
    assert engine.scheduler.counters.prefix_queries == 0
    assert all(story.num_cached == 0 for story in told)
    return told


def computed_tokens(engine: Engine) -> int:
    """Positions that went through the experts, a layer's worth."""
    shape = engine.load.total.shape
    return int(engine.load.total.sum()) // (shape[0] * 2)


@pytest.mark.parametrize("kernel", ["fp32", "fp16"])
@pytest.mark.parametrize("window", [None, 40])
async def test_tokens_and_logprobs_are_those_of_an_engine_without_it(
    tmp_path: Path, kernel: str, window: int | None
) -> None:
    write_mixtral(tmp_path / "model", sliding_window=window)
    model = TinyModel.load(tmp_path / "model", kernel)
    requests = conversations()
    expected = [story.exact for story in await without_cache(model, requests)]
    for settings in ({"chunk": 512}, {"chunk": 48}, {"chunk": 33, "microbatches": 2}):
        stories = Stories()
        engine = make_engine(model, stories, **settings)
        async with running(engine):
            for waves in (9, 3, 1):  # everything is found in the later ones
                told = await tell_all(engine, stories, requests, waves)
                assert [story.exact for story in told] == expected, (settings, waves)
                assert [story.num_cached % BLOCK for story in told] == [0] * len(told)
        assert [story.num_cached for story in told if story.num_cached == 0] == [0], "only who is scored finds nothing"
        assert engine.scheduler.counters.prefix_hits > 2000


async def test_what_is_found_is_not_computed_and_the_last_token_always_is(model: TinyModel) -> None:
    stories = Stories()
    engine = make_engine(model, stories)
    prompt = ids(4 * BLOCK, 1)
    async with running(engine):
        (cold,) = await tell(engine, stories, [request(prompt, 1)])
        assert computed_tokens(engine) == 128
        (whole,) = await tell(engine, stories, [request(prompt, 1)])
        assert computed_tokens(engine) == 128 + 32
        (longer,) = await tell(engine, stories, [request([*prompt, 5], 1)])
        assert computed_tokens(engine) == 128 + 32 + 1
    assert [story.num_cached for story in (cold, whole, longer)] == [0, 96, 128]
    assert whole.exact == cold.exact
    counters = engine.scheduler.counters
    assert (counters.prefix_queries, counters.prefix_hits, counters.prompt_tokens) == (385, 224, 161)


async def test_an_answer_is_found_as_part_of_the_next_prompt(model: TinyModel) -> None:
    stories = Stories()
    engine = make_engine(model, stories)
    async with running(engine):
        (first,) = await tell(engine, stories, [request(ids(50, 1), 60)])
        again = request([*ids(50, 1), *first.tokens, *ids(9, 2)], 5, num_logprobs=1)
        (second,) = await tell(engine, stories, [again])
    assert second.num_cached == 96, "but for the last token of the answer, all is computed"
    assert [second.exact] == [story.exact for story in await without_cache(model, [again])]


async def test_choices_of_one_prompt_hold_its_blocks_once(model: TinyModel) -> None:
    stories = Stories()
    engine = make_engine(model, stories)
    async with running(engine):
        told = [stories.of(engine.submit(request(ids(128, 1), 20))) for _ in range(4)]
        await asyncio.gather(*(story.first.wait() for story in told))
        held = engine.scheduler.blocks.num_blocks - engine.scheduler.blocks.num_free
        assert held == 4 + 4, "four of the prompt, and one of each answer"
        await asyncio.gather(*(story.done.wait() for story in told))
    assert all(story.exact == told[0].exact for story in told)


async def test_nobody_finds_what_a_stranger_has_computed(model: TinyModel) -> None:
    stories = Stories()
    engine = make_engine(model, stories)
    roots = [root_key("", b""), root_key("a", b""), root_key("", b"a"), root_key("a", b"b"), root_key("ab", b"")]
    asked = [request(ids(100, 1), 2, prefix_root=root) for root in roots]
    async with running(engine):
        cold = await tell_all(engine, stories, asked, waves=len(asked))
        warm = await tell_all(engine, stories, asked, waves=len(asked))
    assert [story.num_cached for story in cold] == [0] * 5
    assert [story.num_cached for story in warm] == [96] * 5
    assert all(story.exact == cold[0].exact for story in (*cold, *warm))


async def test_a_cache_that_is_too_small_preempts_and_evicts_and_changes_nothing(model: TinyModel) -> None:
    requests = [*conversations(9), *conversations(9)]
    expected = [story.exact for story in await without_cache(model, requests)]
    stories = Stories()
    engine = make_engine(model, stories, num_blocks=16, chunk=64, max_model_len=400)
    longer = [request(one.prompt_ids, 250) for one in requests[:3]]
    async with running(engine):
        crowd = asyncio.ensure_future(tell(engine, stories, longer * 3))
        told = await tell_all(engine, stories, requests, waves=2)
        await crowd
    assert [story.exact for story in told] == expected
    assert engine.scheduler.counters.preemptions > 0
    assert engine.scheduler.counters.prefix_hits > 0


async def test_who_goes_on_from_elsewhere_finds_prompt_and_output(model: TinyModel) -> None:
    asked = request(ids(90, 3), 60, num_logprobs=1, sampling=SamplingParams(temperature=0.8, seed=5))
    (whole,) = await without_cache(model, [asked])
    rest = request(
        asked.prompt_ids, 60, num_logprobs=1, sampling=asked.sampling, generated_ids=tuple(whole.tokens[:45])
    )
    stories = Stories()
    engine = make_engine(model, stories)
    async with running(engine):
        await tell(engine, stories, [asked])
        before = computed_tokens(engine)
        (story,) = await tell(engine, stories, [rest])
    assert (story.tokens, story.logprobs) == (whole.tokens[45:], whole.logprobs[45:])
    assert computed_tokens(engine) - before == (90 + 45 - 128) + 14, "what follows the last whole block, and the rest"
    assert story.num_cached == 90, "of the prompt"


async def test_guesses_that_did_not_come_true_are_never_shared(model: TinyModel) -> None:
    draw = ids(8, 9)
    requests = [request(draw * 12 + ids(index % 3, index), 70, num_logprobs=1) for index in range(6)]
    expected = [story.exact for story in await without_cache(model, requests)]
    stories = Stories()
    engine = make_engine(
        model, stories, prompt_lookup=PromptLookupConfig(tokens=5, ngram_min=1, ngram_max=3, max_batch=4)
    )
    async with running(engine):
        for _ in range(2):
            told = await tell_all(engine, stories, requests, waves=3)
            assert [story.exact for story in told] == expected
        longer = [request([*one.prompt_ids, *story.tokens], 4) for one, story in zip(requests, told, strict=True)]
        found = await tell_all(engine, stories, longer, waves=6)
    assert engine.scheduler.counters.draft_tokens > engine.scheduler.counters.accepted_draft_tokens > 0
    assert all(story.num_cached > 100 for story in found)
    assert [story.exact for story in found] == [story.exact for story in await without_cache(model, longer)]


async def test_every_position_is_scored_and_has_its_experts_told_though_it_is_cached(model: TinyModel) -> None:
    plain, scored = request(ids(100, 1), 6), request(ids(100, 1), 6, num_prompt_logprobs=1)
    told_experts = request(ids(100, 1), 6, return_routed_experts=True)
    (expected,) = await without_cache(model, [scored])
    stories = Stories()
    engine = make_engine(model, stories)
    async with running(engine):
        (routed,) = await tell(engine, stories, [told_experts])
        found = await tell_all(engine, stories, [plain, scored, told_experts], waves=3)
        goes_on = request(ids(100, 1), 6, return_routed_experts=True, generated_ids=tuple(found[2].tokens[:3]))
        (rest,) = await tell(engine, stories, [goes_on])
    assert [story.num_cached for story in found] == [96, 0, 0]
    assert found[1].exact == expected.exact
    assert found[2].routed == routed.routed
    assert len(routed.routed) == 105
    assert rest.num_cached == 96
    assert rest.routed == routed.routed[102:], "those before were told elsewhere"
    assert engine.scheduler.counters.prefix_queries == 100 + 103, "who may not read is not asked about"


async def test_a_step_that_fails_or_is_cancelled_shares_nothing(model: TinyModel) -> None:
    experts = GatedExperts(model.experts)
    stories = Stories()
    engine = make_engine(model, stories, experts=experts, chunk=64)
    asked = request(ids(120, 1), 3)
    async with running(engine):
        experts.gate.clear()
        seq_id = engine.submit(asked)
        await experts.asked.wait()
        assert engine.cancel(seq_id)
        experts.gate.set()
        await stories.of(seq_id).done.wait()
        experts.errors = [RuntimeError("an expert is struck")]
        (story,) = await tell(engine, stories, [asked])
        (again,) = await tell(engine, stories, [asked])
    assert story.num_cached == 0
    assert again.num_cached == 96
    (expected,) = await without_cache(model, [asked])
    assert story.exact == again.exact == expected.exact


class PoisonedExperts(AsyncExperts):
    """Experts of which the first `poisoned` answers are not numbers."""

    poisoned = 0

    def start(self, layer: int, plan: DispatchPlan, deadline_s: float | None = None) -> Later:
        return Later(self._spoil(layer, plan))

    async def _spoil(self, layer: int, plan: DispatchPlan) -> Answers:
        answers = await self._run(layer, plan)
        if self.poisoned:
            self.poisoned -= 1
            return torch.full_like(answers, torch.nan)
        return answers


async def test_a_sequence_that_failed_leaves_nothing_for_the_next(model: TinyModel) -> None:
    experts = PoisonedExperts(model.local)
    stories = Stories()
    engine = make_engine(model, stories, experts=experts, chunk=64)
    asked = request(ids(120, 1), 3)
    experts.poisoned = 1  # a layer of the first half of the prompt
    async with running(engine):
        (spoilt,) = await tell(engine, stories, [asked])
        (story,) = await tell(engine, stories, [asked])
    assert spoilt.finish_reason is FinishReason.ERROR
    assert story.num_cached == 0
    (expected,) = await without_cache(model, [asked])
    assert story.exact == expected.exact


async def test_when_experts_may_have_erred_all_is_forgotten_and_what_is_under_way_is_not_shared(
    model: TinyModel,
) -> None:
    alarms = [0]
    stories = Stories()
    engine = make_engine(model, stories, alarms=lambda: alarms[0])
    asked = request(ids(100, 1), 40)
    async with running(engine):
        await tell(engine, stories, [asked])
        under_way = stories.of(engine.submit(request(ids(100, 2), 40)))
        await under_way.first.wait()
        alarms[0] += 1
        await under_way.done.wait()
        assert engine.scheduler.blocks.num_cached == 0
        cold = await tell(engine, stories, [asked, request(ids(100, 2), 40)])
        warm = await tell(engine, stories, [asked, request(ids(100, 2), 40)])
    assert [story.num_cached for story in cold] == [0, 0]
    assert [story.num_cached for story in warm] == [96, 96]
    assert warm[1].exact == cold[1].exact == under_way.exact
