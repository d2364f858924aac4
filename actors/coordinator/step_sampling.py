"""From a step's logits to its tokens and log-probabilities, one sequence's trouble kept from the others.

Pure of time and of the scheduler: rows and sampler states in, results out. The sampling mathematics is
`model.sampling.sampler`'s.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from actors.coordinator.batch_builder import RowsOf
from actors.coordinator.engine_io import Failure
from cluster.ids import SequenceId
from model.sampling.sampler import (
    PositionLogprobs,
    Sampled,
    SampleError,
    SamplerState,
    prompt_logprobs,
    sample,
)
from protos.expert_pb2 import STATUS_INTERNAL

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """How one sequence wants its rows read. `None` switches log-probabilities off."""

    state: SamplerState
    num_logprobs: int | None
    num_prompt_logprobs: int | None


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one share's rows gave: scores of prompt positions, and a token where one was due."""

    prompt_logprobs: tuple[PositionLogprobs, ...]
    sampled: Sampled | None


def sample_step(
    logits_RV: Tensor, rows: Sequence[RowsOf], choices: Mapping[SequenceId, Choice]
) -> dict[SequenceId, RowResult | Failure]:
    """A result or a failure for each of `rows`, whose sequences must all be in `choices`."""
    scores = {_id(one): _score(logits_RV, one, choices[_id(one)]) for one in rows}
    drawing = [one for one in rows if one.sample is not None and not isinstance(scores[_id(one)], Failure)]
    drawn = _draw_all(logits_RV, drawing, choices)
    results: dict[SequenceId, RowResult | Failure] = {}
    for seq_id, score in scores.items():
        token = drawn.get(seq_id)
        if isinstance(score, Failure):
            results[seq_id] = score
        elif isinstance(token, Failure):
            results[seq_id] = token
        else:
            results[seq_id] = RowResult(score, token)
    return results


def _score(logits_RV: Tensor, one: RowsOf, choice: Choice) -> tuple[PositionLogprobs, ...] | Failure:
    targets = one.prompt_targets
    if not targets or choice.num_prompt_logprobs is None:
        return ()
    try:
        return tuple(prompt_logprobs(logits_RV[one.prompt], targets, choice.num_prompt_logprobs))
    except Exception as error:  # noqa: BLE001 - one sequence's rows: the others of the step must not fail with it
        return _failed("scoring the prompt", _id(one), error)


def _draw_all(
    logits_RV: Tensor, rows: Sequence[RowsOf], choices: Mapping[SequenceId, Choice]
) -> dict[SequenceId, Sampled | Failure]:
    """All rows in one call; where that raises, one by one, so that only the guilty fail."""
    try:
        drawn = _draw(logits_RV, rows, choices)
    except Exception as error:  # noqa: BLE001 - `sample` answers by row: a bug, contained and logged below
        if len(rows) == 1:
            return {_id(rows[0]): _failed("sampling", _id(rows[0]), error)}
        return {seq_id: one for row in rows for seq_id, one in _draw_all(logits_RV, [row], choices).items()}
    return {
        _id(row): _failed("sampling", _id(row), one.reason) if isinstance(one, SampleError) else one
        for row, one in zip(rows, drawn, strict=True)
    }


def _draw(
    logits_RV: Tensor, rows: Sequence[RowsOf], choices: Mapping[SequenceId, Choice]
) -> list[Sampled | SampleError]:
    if not rows:
        return []
    wanted = [choices[_id(row)] for row in rows]
    return sample(
        logits_RV[[row.sample for row in rows if row.sample is not None]],
        [one.state for one in wanted],
        [one.num_logprobs for one in wanted],
        [row.item.sequence.forbidden_ids() for row in rows],
    )


def _id(row: RowsOf) -> SequenceId:
    return row.item.sequence.seq_id


def _failed(what: str, seq_id: SequenceId, why: Exception | str) -> Failure:
    LOG.error(
        "%s failed for sequence %d: %s",
        what,
        seq_id,
        why,
        exc_info=why if isinstance(why, Exception) else None,
    )
    return Failure(STATUS_INTERNAL, f"{what} failed: {why}")
