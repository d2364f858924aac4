"""A sequence's limits and what ends it."""

import pytest

from cluster.ids import SequenceId
from cluster.sequence import FinishReason, Sequence, SequenceError, SequenceStatus


def make(
    prompt: tuple[int, ...] = (5, 6, 7),
    max_tokens: int = 4,
    min_tokens: int = 0,
    *,
    ignore_eos: bool = False,
    wants_prompt_logprobs: bool = False,
    follows_grammar: bool = False,
) -> Sequence:
    return Sequence(
        seq_id=SequenceId(1),
        prompt_ids=prompt,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        eos_token_ids=frozenset([2]),
        stop_token_ids=frozenset([9]),
        ignore_eos=ignore_eos,
        wants_prompt_logprobs=wants_prompt_logprobs,
        follows_grammar=follows_grammar,
    )


def test_a_new_sequence_waits_with_its_prompt_uncomputed() -> None:
    new = make()
    assert (new.num_prompt, new.num_tokens, new.num_uncomputed) == (3, 3, 3)
    assert (new.status, new.finish_reason, new.is_finished) == (SequenceStatus.WAITING, None, False)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "min_tokens", "message"),
    [
        ((), 4, 0, "prompt_ids is empty"),
        ((1,), -1, 0, "max_tokens is -1, but must be at least 0"),
        ((1,), 0, 0, "max_tokens is 0, but must be at least 1"),
        ((1,), 4, 5, r"min_tokens is 5, but must be from 0 to max_tokens \(4\)"),
        ((1,), 4, -1, "min_tokens is -1"),
    ],
)
def test_senseless_limits_are_refused_by_name(
    prompt: tuple[int, ...], max_tokens: int, min_tokens: int, message: str
) -> None:
    with pytest.raises(SequenceError, match=message):
        make(prompt, max_tokens, min_tokens)


def test_eos_and_stop_tokens_end_it() -> None:
    for token in (2, 9):
        assert make().receive(token, 100) is FinishReason.STOP
    assert make().receive(3, 100) is None


def test_ignoring_eos_leaves_the_stop_tokens() -> None:
    assert make(ignore_eos=True).receive(2, 100) is None
    assert make(ignore_eos=True).receive(9, 100) is FinishReason.STOP
    assert make(ignore_eos=True).stop_ids == {9}


def test_what_would_end_it_is_forbidden_below_min_tokens() -> None:
    growing = make(min_tokens=2)
    assert growing.forbidden_ids() == {2, 9}
    assert growing.receive(4, 100) is None
    assert growing.forbidden_ids() == {2, 9}
    assert growing.receive(2, 100) is None, "a sampler that ignores the ban does not end it either"
    assert growing.forbidden_ids() == frozenset()
    assert growing.receive(2, 100) is FinishReason.STOP


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_where_it_follows_a_grammar_an_end_of_sequence_always_ends_it(ignore_eos: bool) -> None:
    bound = make(min_tokens=3, ignore_eos=ignore_eos, follows_grammar=True)
    assert bound.stop_ids == {2, 9}, "no guess may go beyond it"
    assert bound.forbidden_ids() == {2, 9}
    assert bound.receive(9, 100) is None, "a stop token has to wait for min_tokens"
    assert bound.receive(2, 100) is FinishReason.STOP
    longer = make(min_tokens=1, ignore_eos=ignore_eos, follows_grammar=True)
    longer.receive(5, 100)
    assert longer.forbidden_ids() == ({2} if ignore_eos else set())


def test_the_last_allowed_token_ends_it_by_length_unless_it_stops() -> None:
    assert make(max_tokens=1).receive(4, 100) is FinishReason.LENGTH
    assert make(max_tokens=1).receive(9, 100) is FinishReason.STOP
    assert make(max_tokens=9).receive(4, 4) is FinishReason.LENGTH


def test_scoring_alone_ends_without_a_token() -> None:
    scored = make(max_tokens=0, wants_prompt_logprobs=True)
    assert scored.receive(None, 100) is FinishReason.LENGTH
    assert scored.output_ids == []


def test_progress_is_noted_with_its_peak() -> None:
    moving = make()
    moving.advance(2)
    assert (moving.num_computed, moving.peak_computed, moving.num_uncomputed) == (2, 2, 1)
    moving.num_computed = 0
    moving.advance(1)
    assert (moving.num_computed, moving.peak_computed) == (1, 2)
    with pytest.raises(AssertionError):
        moving.advance(4)
    with pytest.raises(AssertionError):
        moving.advance(1)


def test_token_ids_run_from_the_prompt_into_the_output() -> None:
    spoken = make()
    spoken.output_ids += [10, 11]
    assert spoken.token_ids(0, 5) == (5, 6, 7, 10, 11)
    assert spoken.token_ids(2, 4) == (7, 10)
    assert spoken.token_ids(4, 5) == (11,)
    assert spoken.token_ids(1, 2) == (6,)
    assert spoken.token_ids(3, 3) == ()
    with pytest.raises(AssertionError):
        spoken.token_ids(0, 6)


@pytest.mark.parametrize(("max_tokens", "limit", "positions"), [(4, 100, 6), (4, 5, 4), (1, 100, 3)])
def test_the_last_token_is_never_computed(max_tokens: int, limit: int, positions: int) -> None:
    assert make(max_tokens=max_tokens).final_computed(limit) == positions


def test_scoring_computes_the_whole_prompt() -> None:
    assert make(max_tokens=0, wants_prompt_logprobs=True).final_computed(100) == 3
