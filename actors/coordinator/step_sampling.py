"""From a step's logits to its tokens and log-probabilities, one sequence's trouble kept from the others.

Pure of time and of the scheduler: rows and sampler states in, results out. A guessed token is never judged by
its probability: each row is sampled just as it would be without guesses, and the guess was true if it is the
very token sampled. So guesses change when a token comes, never which. The sampling mathematics is
`model.sampling.sampler`'s.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from actors.coordinator.batch_builder import RowsOf
from actors.coordinator.engine_io import Failure
from actors.coordinator.grammar_mask import Followed
from cluster.ids import SequenceId
from model.grammar.compiled import GrammarFailed
from model.sampling.masks import Masked, TokenMask
from model.sampling.sampler import (
    PositionLogprobs,
    Sampled,
    SampleError,
    SamplerState,
    prompt_logprobs,
    sample,
)
from protos.expert_pb2 import STATUS_INTERNAL, STATUS_INVALID

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """How one sequence wants its rows read. `None` switches log-probabilities off.

    All of `masks` must be content; `grammar` is what it follows.
    """

    state: SamplerState
    num_logprobs: int | None
    num_prompt_logprobs: int | None
    masks: tuple[TokenMask, ...] = ()
    grammar: Followed | None = None

    def observe(self, token: int) -> None:
        """Account for a token that was put out."""
        self.state.observe(token)
        if self.grammar is not None:
            self.grammar.observe(token)


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one share's rows gave: scores of prompt positions, and tokens where one was due: all that is certain."""

    prompt_logprobs: tuple[PositionLogprobs, ...]
    sampled: tuple[Sampled, ...]


@dataclass(frozen=True, slots=True)
class _Turn:
    """A share's next draw, after `ahead` guesses came true; `choice` knows of these."""

    row: RowsOf
    choice: Choice
    ahead: int = 0

    @property
    def seq_id(self) -> SequenceId:
        return _id(self.row)

    @property
    def masked(self) -> Masked | None:
        """The sequence's masks, if it has any, and all its output before this draw."""
        if not self.choice.masks:
            return None
        output_ids = self.row.item.sequence.output_ids
        came_true = self.row.item.draft_ids[: self.ahead]
        return Masked(self.choice.masks, [*output_ids, *came_true] if came_true else output_ids)

    def by_grammar(self) -> tuple[Collection[int], Tensor | None]:
        """Tokens that must not be drawn, and those that may be, where not every other one may. Raises GrammarFailed."""
        item, grammar = self.row.item, self.choice.grammar
        forbidden = item.sequence.forbidden_ids(self.ahead)
        if grammar is None:
            return forbidden, None
        return (), grammar.allowed_ids(item.draft_ids[: self.ahead], item.sequence, forbidden)

    def following(self, sampled: Sampled) -> "_Turn | None":
        """The draw after this one, where this one's token was guessed."""
        draft_ids = self.row.item.draft_ids
        if self.ahead == len(draft_ids) or draft_ids[self.ahead] != sampled.token:
            return None
        state = self.choice.state.after(sampled.token)
        return _Turn(self.row, replace(self.choice, state=state), self.ahead + 1)


def sample_step(
    logits_RV: Tensor, rows: Sequence[RowsOf], choices: Mapping[SequenceId, Choice]
) -> dict[SequenceId, RowResult | Failure]:
    """A result or a failure for each of `rows`, whose sequences must all be in `choices`."""
    scores = {_id(one): _score(logits_RV, one, choices[_id(one)]) for one in rows}
    drawing = [one for one in rows if one.item.needs_token and not isinstance(scores[_id(one)], Failure)]
    drawn = _draw_runs(logits_RV, [_Turn(one, choices[_id(one)]) for one in drawing])
    results: dict[SequenceId, RowResult | Failure] = {}
    for seq_id, score in scores.items():
        tokens = drawn.get(seq_id, ())
        if isinstance(score, Failure):
            results[seq_id] = score
        elif isinstance(tokens, Failure):
            results[seq_id] = tokens
        else:
            results[seq_id] = RowResult(score, tokens)
    return results


def _score(logits_RV: Tensor, one: RowsOf, choice: Choice) -> tuple[PositionLogprobs, ...] | Failure:
    targets = one.prompt_targets
    if not targets or choice.num_prompt_logprobs is None:
        return ()
    try:
        return tuple(prompt_logprobs(logits_RV[one.prompt], targets, choice.num_prompt_logprobs))
    except Exception as error:  # noqa: BLE001 - one sequence's rows: the others of the step must not fail with it
        return _failed("scoring the prompt", _id(one), error)


def _draw_runs(logits_RV: Tensor, turns: Sequence[_Turn]) -> dict[SequenceId, tuple[Sampled, ...] | Failure]:
    """Round by round, as long as guesses come true.

    A failure after the first token is left for the next step to find, as it would be without guesses.
    """
    runs: dict[SequenceId, tuple[Sampled, ...] | Failure] = {}
    while turns:
        following: list[_Turn] = []
        for turn, one in zip(turns, _draw_all(logits_RV, turns), strict=True):
            so_far = runs.get(turn.seq_id, ())
            assert not isinstance(so_far, Failure), f"sequence {turn.seq_id} draws again after a failure"
            if isinstance(one, Failure):
                runs[turn.seq_id] = so_far or one
                continue
            runs[turn.seq_id] = (*so_far, one)
            following += [after for after in [turn.following(one)] if after is not None]
        turns = following
    return runs


def _draw_all(logits_RV: Tensor, turns: Sequence[_Turn]) -> list[Sampled | Failure]:
    """All rows in one call; where that raises, one by one, so that only the guilty fail."""
    try:
        drawn = _draw(logits_RV, turns)
    except GrammarFailed as error:
        if len(turns) == 1:
            return [Failure(STATUS_INVALID, f"grammar: {error}")]
        return [one for turn in turns for one in _draw_all(logits_RV, [turn])]
    except Exception as error:  # noqa: BLE001 - `sample` answers by row: a bug, contained and logged below
        if len(turns) == 1:
            return [_failed("sampling", turns[0].seq_id, error)]
        return [one for turn in turns for one in _draw_all(logits_RV, [turn])]
    return [
        _refused(turn.seq_id, one) if isinstance(one, SampleError) else one
        for turn, one in zip(turns, drawn, strict=True)
    ]


def _draw(logits_RV: Tensor, turns: Sequence[_Turn]) -> list[Sampled | SampleError]:
    grammars = [turn.by_grammar() for turn in turns]
    return sample(
        logits_RV[[turn.row.sample.start + turn.ahead for turn in turns]],
        [turn.choice.state for turn in turns],
        [turn.choice.num_logprobs for turn in turns],
        [forbidden for forbidden, _ in grammars],
        [allowed for _, allowed in grammars],
        masked=[turn.masked for turn in turns],
    )


def _id(row: RowsOf) -> SequenceId:
    return row.item.sequence.seq_id


def _refused(seq_id: SequenceId, error: SampleError) -> Failure:
    """Who asked for the impossible is told so; it is no failure of ours that another try could mend."""
    if error.by_request:
        return Failure(STATUS_INVALID, error.reason)
    return _failed("sampling", seq_id, error.reason)


def _failed(what: str, seq_id: SequenceId, why: Exception | str) -> Failure:
    LOG.error(
        "%s failed for sequence %d: %s",
        what,
        seq_id,
        why,
        exc_info=why if isinstance(why, Exception) else None,
    )
    return Failure(STATUS_INTERNAL, f"{what} failed: {why}")
