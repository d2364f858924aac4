"""From a scheduled batch to rows of logits and from those to tokens: whose row is whose, and who fails alone."""

from collections.abc import Sequence as Items

import pytest
import torch

from actors.coordinator.batch_builder import build_step
from actors.coordinator.engine_io import Failure
from actors.coordinator.step_sampling import Choice, RowResult, sample_step
from cluster.ids import SequenceId
from cluster.scheduler import ScheduledBatch, ScheduledSequence
from cluster.sequence import Sequence
from model.sampling.masks import BadWords, OnlyTokens
from model.sampling.sampler import SamplerState, SamplingParams
from protos.expert_pb2 import STATUS_INTERNAL, STATUS_INVALID

GREEDY = SamplingParams(temperature=0.0)


def share(
    seq_id: int,
    prompt: list[int],
    start: int,
    num_tokens: int,
    *,
    scores: bool = False,
    output: tuple[int, ...] = (),
    draft: tuple[int, ...] = (),
) -> ScheduledSequence:
    sequence = Sequence(
        seq_id=SequenceId(seq_id), prompt_ids=prompt, max_tokens=9, min_tokens=1, stop_token_ids=frozenset({2}),
        wants_prompt_logprobs=scores,
    )  # fmt: skip
    sequence.output_ids.extend(output)
    stop = start + num_tokens
    return ScheduledSequence(
        sequence=sequence,
        start=start,
        num_tokens=num_tokens + len(draft),
        token_ids=(*sequence.token_ids(start, stop), *draft),
        block_table=(seq_id,),
        needs_token=stop == sequence.num_tokens,
        num_draft=len(draft),
    )


def choice(state: SamplerState | None = None, num_logprobs: int | None = None, prompt: int | None = None) -> Choice:
    return Choice(state or SamplerState(GREEDY, ()), num_logprobs, prompt)


def test_shares_lie_side_by_side_and_rows_know_their_owner() -> None:
    batch = ScheduledBatch(
        step=0,
        items=(
            share(0, [5, 6], 2, 1, output=(7,)),
            share(1, [10, 11, 12, 13, 14], 1, 3, scores=True),
            share(2, [20, 21, 22], 0, 2),
            share(3, [30, 31, 32], 1, 2, scores=True),
        ),
    )
    step = build_step(batch)
    assert step.forward.token_ids_T.tolist() == [7, 11, 12, 13, 20, 21, 31, 32]
    assert step.forward.positions_T.tolist() == [2, 1, 2, 3, 0, 1, 1, 2]
    assert [(one.num_tokens, one.context_len) for one in step.forward.sequences] == [
        (1, 3),
        (3, 4),
        (2, 2),
        (2, 3),
    ]
    assert [one.block_table for one in step.forward.sequences] == [(0,), (1,), (2,), (3,)]
    assert step.forward.logits_rows == (0, 1, 2, 3, 6, 7)
    assert [one.item.sequence.seq_id for one in step.rows] == [0, 1, 3], "a chunk in mid-prompt needs no logits"
    assert [(one.prompt, one.sample) for one in step.rows] == [
        (slice(0, 0), slice(0, 1)),
        (slice(1, 4), slice(4, 4)),
        (slice(4, 5), slice(5, 6)),
    ]
    assert [one.all for one in step.rows] == [slice(0, 1), slice(1, 4), slice(4, 6)]
    assert [one.prompt_targets for one in step.rows] == [(), (12, 13, 14), (32,)]


def test_each_row_is_read_as_its_sequence_wants() -> None:
    batch = ScheduledBatch(step=0, items=(share(0, [5], 0, 1), share(1, [3, 4], 0, 2, scores=True)))
    step = build_step(batch)
    logits_RV = torch.tensor([[0.0, 1, 9, 3, 0], [0, 0, 0, 0, 5], [1, 0, 0, 0, 0]])
    results = sample_step(logits_RV, step.rows, {SequenceId(0): choice(), SequenceId(1): choice(None, 1, 0)})
    first, second = results[SequenceId(0)], results[SequenceId(1)]
    assert isinstance(first, RowResult)
    assert isinstance(second, RowResult)
    (token,) = first.sampled
    assert token.token == 3, "2 would stop it, and it may not stop yet"
    assert token.logprob is None
    assert [place.chosen.token for place in second.prompt_logprobs] == [4]
    (token,) = second.sampled
    assert token.token == 0
    assert token.logprob is not None
    assert [one.token for one in token.logprob.top] == [0]


@pytest.mark.parametrize("bad_row", [0, 1, 2])
def test_a_row_that_is_no_distribution_fails_its_sequence_alone(bad_row: int) -> None:
    batch = ScheduledBatch(
        step=0,
        items=(share(0, [5], 0, 1), share(1, [3, 4], 0, 2, scores=True), share(2, [5], 0, 1)),
    )
    step = build_step(batch)
    logits_RV = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    logits_RV[bad_row, 3] = float("nan")
    choices = {SequenceId(0): choice(), SequenceId(1): choice(None, None, 2), SequenceId(2): choice()}
    results = sample_step(logits_RV, step.rows, choices)
    failed = {seq_id for seq_id, one in results.items() if isinstance(one, Failure)}
    assert failed == {SequenceId(0 if bad_row == 0 else 1)}
    (failure,) = [one for one in results.values() if isinstance(one, Failure)]
    assert failure.status == STATUS_INTERNAL
    assert "logits are not a distribution" in failure.text


class Bug(SamplerState):
    def adjust(self, row_V: torch.Tensor) -> None:
        raise ZeroDivisionError("a bug in one sequence's penalties")


def test_a_bug_in_one_sequences_sampling_fails_that_sequence_alone() -> None:
    batch = ScheduledBatch(step=0, items=tuple(share(index, [5], 0, 1) for index in range(3)))
    step = build_step(batch)
    logits_RV = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    bug = Bug(SamplingParams(temperature=0.0, repetition_penalty=1.5), ())
    choices = {SequenceId(0): choice(), SequenceId(1): choice(bug), SequenceId(2): choice()}
    results = sample_step(logits_RV, step.rows, choices)
    assert [isinstance(results[SequenceId(index)], Failure) for index in range(3)] == [False, True, False]
    failure = results[SequenceId(1)]
    assert isinstance(failure, Failure)
    assert failure.text == "sampling failed: a bug in one sequence's penalties"


def test_a_step_without_rows_gives_nothing() -> None:
    step = build_step(ScheduledBatch(step=0, items=(share(0, [5, 6, 7], 0, 2),)))
    assert step.forward.logits_rows == ()
    assert sample_step(torch.empty(0, 8), step.rows, {}) == {}


def test_a_share_with_guesses_has_a_row_for_each_and_one_more() -> None:
    batch = ScheduledBatch(
        step=0,
        items=(
            share(0, [5, 6], 2, 1, output=(7,), draft=(8, 9)),
            share(1, [10, 11], 0, 2),
            share(2, [20], 1, 1, output=(21,)),
        ),
    )
    step = build_step(batch)
    assert step.forward.token_ids_T.tolist() == [7, 8, 9, 10, 11, 21]
    assert step.forward.positions_T.tolist() == [2, 3, 4, 0, 1, 1]
    assert step.forward.logits_rows == (0, 1, 2, 4, 5)
    assert [one.sample for one in step.rows] == [slice(0, 3), slice(3, 4), slice(4, 5)]
    assert [one.item.known_stop for one in step.rows] == [3, 2, 2]


def one_hot(*tokens: int) -> torch.Tensor:
    """Rows of logits of which each says one token."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), 10).float()


def drawn(logits_RV: torch.Tensor, draft: tuple[int, ...], one: Choice) -> list[int] | Failure:
    step = build_step(ScheduledBatch(step=0, items=(share(0, [5], 1, 1, output=(7,), draft=draft),)))
    result = sample_step(logits_RV, step.rows, {SequenceId(0): one})[SequenceId(0)]
    return result if isinstance(result, Failure) else [place.token for place in result.sampled]


@pytest.mark.parametrize(
    ("said", "expected"),
    [((8, 9, 3), [8, 9, 3]), ((8, 1, 3), [8, 1]), ((1, 9, 3), [1]), ((9, 8, 3), [9])],
)
def test_rows_are_sampled_as_far_as_guesses_come_true(said: tuple[int, ...], expected: list[int]) -> None:
    assert drawn(one_hot(*said), (8, 9), choice()) == expected


def test_penalties_and_draws_know_of_the_guesses_before_them_and_the_state_stays_as_it_was() -> None:
    """Each row is drawn as in a step of its own: from the same uniform number, with the same history."""
    params = SamplingParams(temperature=1.0, seed=5, frequency_penalty=0.9, repetition_penalty=1.1)
    rows = torch.randn(4, 10, generator=torch.Generator().manual_seed(3))
    alone = SamplerState(params, (5,), (7,))
    expected: list[int] = []
    for row in rows:
        (token,) = drawn_one(row[None], alone)
        expected.append(token)
        alone.observe(token)
    state = SamplerState(params, (5,), (7,))
    for _ in range(2):
        assert drawn(rows, tuple(expected[:3]), choice(state)) == expected, "drawing twice is drawing once"
    assert state.num_output == 1


def drawn_one(logits_RV: torch.Tensor, state: SamplerState) -> list[int]:
    tokens = drawn(logits_RV, (), choice(state))
    assert not isinstance(tokens, Failure)
    return tokens


def test_min_tokens_count_the_guesses_before_a_row() -> None:
    step = build_step(ScheduledBatch(step=0, items=(share(0, [5], 0, 1, draft=(4, 6)),)))
    says_stop = one_hot(2, 2, 2) + one_hot(4, 4, 4) / 2
    result = sample_step(says_stop, step.rows, {SequenceId(0): choice()})[SequenceId(0)]
    assert isinstance(result, RowResult)
    assert [place.token for place in result.sampled] == [4, 2], "the first must not stop, the second may"


class Noting:
    """A mask that forbids nothing and remembers after which outputs it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def apply(self, row_V: torch.Tensor, output_ids: Items[int]) -> None:
        self.asked.append(list(output_ids))


def test_masks_are_asked_after_all_output_and_the_guesses_that_came_true() -> None:
    noting = Noting()
    one = Choice(SamplerState(GREEDY, (), (7,)), None, None, (noting,))
    assert drawn(one_hot(8, 1, 3), (8, 9), one) == [8, 1]
    assert noting.asked == [[7], [7, 8]]


def test_a_mask_that_ends_a_run_of_guesses_sends_it_another_way() -> None:
    one = Choice(SamplerState(GREEDY, (), (7,)), None, None, (BadWords([[8, 9]]),))
    assert drawn(one_hot(8, 9, 3) + one_hot(4, 4, 4) / 2, (8, 9), one) == [8, 4]


def test_a_request_that_forbids_every_token_is_told_that_it_is_wrong() -> None:
    one = Choice(SamplerState(GREEDY, (), (7,)), None, None, (OnlyTokens([3]), BadWords([[3]])))
    failure = drawn(one_hot(3), (), one)
    assert failure == Failure(STATUS_INVALID, "no token may come next: what the request forbids leaves none")


@pytest.mark.parametrize(("bad_row", "expected"), [(0, None), (1, [8]), (2, [8, 9])])
def test_a_bad_row_after_the_first_is_left_for_the_next_step(bad_row: int, expected: list[int] | None) -> None:
    logits_RV = one_hot(8, 9, 3)
    logits_RV[bad_row, 3] = float("nan")
    tokens = drawn(logits_RV, (8, 9), choice())
    assert isinstance(tokens, Failure) if expected is None else tokens == expected


def test_a_bad_row_behind_a_wrong_guess_is_never_looked_at() -> None:
    logits_RV = one_hot(1, 9, 3)
    logits_RV[1:] = float("nan")
    assert drawn(logits_RV, (8, 9), choice()) == [1]
