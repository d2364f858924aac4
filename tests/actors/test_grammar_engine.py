"""Answers that follow grammars, in a real engine: neighbours, preemption, guesses, going on elsewhere and faults change
no bit of them; they end where the grammar ends, and only there.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import actors.coordinator.engine as engine_module
from actors.coordinator.engine import Engine
from actors.coordinator.engine_io import GenerationRequest
from actors.coordinator.grammar_mask import Followed
from cluster.prompt_lookup import PromptLookupConfig
from cluster.sequence import FinishReason
from model.grammar.spec import GrammarKind, GrammarSpec, choice, json_schema
from model.sampling.sampler import SamplingParams
from protos.expert_pb2 import STATUS_INVALID
from tests.support.engines import GREEDY, Stories, Story, TinyModel, make_engine, running, tell
from tests.support.faults import Fault
from tests.support.grammars import byte_tokenizer, compiled, text_of
from tests.support.rambling import write_rambling
from tests.support.tokenizers import EOS_ID

pytestmark = pytest.mark.anyio

LOOKUP = PromptLookupConfig(tokens=5, ngram_max=3, ngram_min=1, max_batch=64)
A, B, C = (5 + ord(letter) for letter in "abc")
SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 99}, "tag": {"enum": ["red", "green"]}},
    "required": ["id", "tag"],
    "additionalProperties": False,
}
SPECS = [
    GrammarSpec(GrammarKind.REGEX, r"(ab|ba){6,40}c?"),
    json_schema(SCHEMA, whitespace=""),
    choice(["hello", "help", "ab" * 20]),
    GrammarSpec(GrammarKind.REGEX, r"[a-z]{30,}"),
    GrammarSpec(GrammarKind.LARK, 'start: "[" item ("," item)* "]"\nitem: /[a-f]{1,4}/ | start'),
]
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, seed=7)
KINDS: list[dict[str, Any]] = [
    {},
    {"num_logprobs": 3, "num_prompt_logprobs": 1},
    {"sampling": DRAWN, "num_logprobs": 1},
    {"sampling": SamplingParams(temperature=1.0, top_k=3, min_p=0.02, seed=3)},
    {"sampling": SamplingParams(temperature=0.7, seed=4, repetition_penalty=1.2, frequency_penalty=0.3)},
    {"min_tokens": 20, "sampling": DRAWN},
]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path: Path = tmp_path_factory.mktemp("grammar")
    write_rambling(path)
    return TinyModel.load(path)


def followed(spec: GrammarSpec, generated: Sequence[int] = ()) -> Followed:
    matcher = compiled(spec).matcher()
    for token in generated:
        matcher.observe(token)
    return Followed(matcher)


def asked(spec: GrammarSpec, prompt: str = "ababab", max_tokens: int = 40, **changes: Any) -> GenerationRequest:
    ids = tuple(byte_tokenizer().encode(prompt, add_bos=True))
    fields: dict[str, Any] = {"sampling": GREEDY, **changes}
    return GenerationRequest(prompt_ids=ids, max_tokens=max_tokens, grammar=followed(spec), **fields)


def plain(prompt: str, max_tokens: int = 30, **changes: Any) -> GenerationRequest:
    ids = tuple(byte_tokenizer().encode(prompt, add_bos=True))
    return GenerationRequest(prompt_ids=ids, max_tokens=max_tokens, sampling=GREEDY, ignore_eos=True, **changes)


def all_requests() -> list[GenerationRequest]:
    """Every grammar in every kind, each with a matcher of its own; and some without."""
    requests = [asked(spec, "abba" * (1 + index), **kind) for spec in SPECS for index, kind in enumerate(KINDS)]
    return requests + [plain("abab" * (index + 1)) for index in range(4)]


async def run(model: TinyModel, requests: Sequence[GenerationRequest], **settings: Any) -> tuple[list[Story], Engine]:
    stories = Stories()
    settings = {"eos_token_ids": [EOS_ID], **settings}
    engine = make_engine(model, stories, **settings)
    async with running(engine):
        return await tell(engine, stories, requests), engine


@pytest.fixture(scope="module")
def alone() -> dict[int, Any]:
    """What each of `all_requests` is told when it is alone, found out once."""
    return {}


async def expected(model: TinyModel, alone: dict[int, Any]) -> list[Any]:
    if not alone:
        for place, one in enumerate(all_requests()):
            ((story,), _) = await run(model, [one])
            alone[place] = story.exact
    return list(alone.values())


def said(story: Story) -> str:
    tokens = story.tokens[:-1] if story.finish_reason is FinishReason.STOP else story.tokens
    return text_of([token for token in tokens if token >= 5])


# --- exactness ---


async def test_neighbours_change_no_bit(model: TinyModel, alone: dict[int, Any]) -> None:
    told, _ = await run(model, all_requests(), chunk=64, max_num_seqs=64)
    assert [story.exact for story in told] == await expected(model, alone)
    assert {story.finish_reason for story in told} == {FinishReason.STOP, FinishReason.LENGTH}


async def test_preemption_changes_no_bit(model: TinyModel, alone: dict[int, Any]) -> None:
    told, engine = await run(model, all_requests(), chunk=64, num_blocks=5, max_num_seqs=64)
    assert [story.exact for story in told] == await expected(model, alone)
    assert engine.scheduler.counters.preemptions > 0


async def test_guesses_change_no_bit_and_come_true(model: TinyModel, alone: dict[int, Any]) -> None:
    told, engine = await run(model, all_requests(), prompt_lookup=LOOKUP, max_num_seqs=64)
    assert [story.exact for story in told] == await expected(model, alone)
    assert engine.scheduler.counters.accepted_draft_tokens > 0
    assert engine.scheduler.counters.draft_tokens > engine.scheduler.counters.accepted_draft_tokens


@pytest.mark.parametrize("settings", [{}, {"prompt_lookup": LOOKUP}], ids=["plain", "guessing"])
async def test_every_cut_goes_on_elsewhere(model: TinyModel, settings: dict[str, Any]) -> None:
    for spec in SPECS:
        one = asked(spec, sampling=DRAWN, num_logprobs=1)
        ((whole,), _) = await run(model, [one], **settings)
        cuts = range(len(whole.tokens))
        rest = [
            replace(one, generated_ids=tuple(whole.tokens[:at]), grammar=followed(spec, whole.tokens[:at]))
            for at in cuts
        ]
        told, _ = await run(model, rest, max_num_seqs=64, **settings)
        for at, story in zip(cuts, told, strict=True):
            assert story.tokens == whole.tokens[at:]
            assert story.logprobs == whole.logprobs[at:]
            assert story.finish_reason is whole.finish_reason


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["sample_step", "build_step"])
async def test_steps_that_raise_change_no_bit(
    model: TinyModel, alone: dict[int, Any], monkeypatch: pytest.MonkeyPatch, name: str, after: bool
) -> None:
    wanted = await expected(model, alone)
    draw = random.Random(5)
    fault = Fault(engine_module, name, after=after, when=lambda *_: draw.random() < 0.2)
    fault.install(monkeypatch)
    fault.left = 6
    told, _ = await run(model, all_requests(), max_num_seqs=64)
    assert fault.left < 6
    assert [story.exact for story in told] == wanted


async def test_books_that_must_be_written_anew_take_the_grammar_back(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step dies after tokens were counted, and before they were told."""
    spec = GrammarSpec(GrammarKind.REGEX, r"(ab|ba){6,40}c")
    ((whole,), _) = await run(model, [asked(spec, sampling=DRAWN)])
    fault = Fault(Engine, "_output", after=True)
    fault.install(monkeypatch)
    fault.left = 2
    ((story,), _) = await run(model, [asked(spec, sampling=DRAWN)])
    assert fault.left == 0
    assert story.exact == whole.exact


# --- the end ---


async def test_it_ends_where_the_grammar_ends_with_an_end_of_sequence(model: TinyModel) -> None:
    for changes in ({}, {"ignore_eos": True}, {"min_tokens": 30}, {"ignore_eos": True, "min_tokens": 30}):
        ((story,), _) = await run(model, [asked(choice(["hello"]), **changes)])
        assert said(story) == "hello"
        assert story.tokens[-1] == EOS_ID
        assert story.finish_reason is FinishReason.STOP


async def test_where_it_may_end_or_go_on_min_tokens_and_ignore_eos_keep_it_going(model: TinyModel) -> None:
    spec = GrammarSpec(GrammarKind.REGEX, "[a-z]*")
    ends = [asked(spec, sampling=SamplingParams(temperature=5.0, seed=seed), max_tokens=60) for seed in range(20)]
    told, _ = await run(model, ends, max_num_seqs=64)
    stopped = [story for story in told if story.finish_reason is FinishReason.STOP]
    assert stopped, "an even draw of 27 tokens ends some of these"
    assert min(len(story.tokens) for story in stopped) < 15
    more = [replace(one, min_tokens=15, grammar=followed(spec)) for one in ends]
    longer, _ = await run(model, more, max_num_seqs=64)
    assert min(len(story.tokens) for story in longer) >= 15
    most = [replace(one, ignore_eos=True, grammar=followed(spec)) for one in ends]
    whole, _ = await run(model, most, max_num_seqs=64)
    assert {story.finish_reason for story in whole} == {FinishReason.LENGTH}


async def test_an_end_is_never_early(model: TinyModel) -> None:
    """Even where a model would rather end: every token of the vocabulary but the grammar's is out of the question."""
    hot = [
        asked(GrammarSpec(GrammarKind.REGEX, "[ab]{10}"), sampling=SamplingParams(temperature=50.0, seed=seed))
        for seed in range(30)
    ]
    told, _ = await run(model, hot, max_num_seqs=64)
    for story in told:
        assert len(said(story)) == 10
        assert set(said(story)) <= {"a", "b"}


async def test_stop_tokens_stop_where_the_grammar_lets_them_be_said(model: TinyModel) -> None:
    spec = GrammarSpec(GrammarKind.REGEX, "(ab){5}")
    ((story,), _) = await run(model, [asked(spec, stop_token_ids=frozenset({B}), sampling=DRAWN)])
    ab = byte_tokenizer().encode("ab", add_bos=False)
    if story.tokens[:1] == ab:
        assert story.finish_reason is FinishReason.STOP
    else:
        assert story.tokens == [A, B]
        assert story.finish_reason is FinishReason.STOP
    special = 4  # <|im_end|>: no text, so it is an end like the end of sequence
    told, _ = await run(
        model,
        [
            asked(
                GrammarSpec(GrammarKind.REGEX, "[a-z]*"),
                stop_token_ids=frozenset({special}),
                sampling=SamplingParams(temperature=50.0, seed=seed),
                max_tokens=200,
            )
            for seed in range(10)
        ],
        max_num_seqs=64,
    )
    assert {story.tokens[-1] for story in told} == {special, EOS_ID}


async def test_logprobs_are_the_models_own_not_those_of_what_is_left(model: TinyModel) -> None:
    free = replace(asked(choice(["zebra"]), num_logprobs=2), grammar=None, ignore_eos=True, max_tokens=1)
    ((unbound,), _) = await run(model, [free])
    ((bound,), _) = await run(model, [asked(choice(["zebra"]), num_logprobs=2)])
    assert bound.logprobs[0].top == unbound.logprobs[0].top
    assert bound.logprobs[0].chosen.logprob < 0
    assert bound.logprobs[0].chosen.rank > 1


# --- failures ---


async def test_a_grammar_that_becomes_too_complex_fails_its_request_alone(model: TinyModel) -> None:
    bomb = GrammarSpec(GrammarKind.REGEX, "((a{1,1000}){1,1000}){1,1000}")
    others = [asked(SPECS[0]), plain("abab")]
    expected_others = [(await run(model, [one]))[0][0].exact for one in [asked(SPECS[0]), plain("abab")]]
    told, engine = await run(model, [asked(bomb, max_tokens=400), *others], max_model_len=512)
    assert told[0].failure is not None
    assert told[0].failure.status == STATUS_INVALID
    assert "too many" in told[0].failure.text
    assert [story.exact for story in told[1:]] == expected_others
    assert engine.counters.failed_steps == 0


async def test_masks_are_counted(model: TinyModel) -> None:
    one = asked(choice(["hello"]))
    assert one.grammar is not None
    ((story,), _) = await run(model, [one])
    assert one.grammar.counters.masks == len(story.tokens)
    assert one.grammar.counters.seconds > 0
