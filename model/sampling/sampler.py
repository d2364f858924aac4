"""Chooses each sequence's next token from its logits.

A row's token and logprobs depend on its own logits, parameters, history and seed, never on the rest of the
batch: rows that draw are computed one at a time, and the only batched operation is argmax, which does not
round. Bad logits in one row become a `SampleError` in its place. Which tokens end a sequence is the
scheduler's knowledge.
"""

import copy
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.sampling.filters import candidates, draw
from model.sampling.logprobs import (
    LogitsError,
    PositionLogprobs,
    TokenLogprob,
    position_logprobs,
    prompt_logprobs,
)
from model.sampling.params import SamplingParams, SamplingParamsError, uniform

__all__ = [
    "LogitsError",
    "PositionLogprobs",
    "SampleError",
    "Sampled",
    "SamplerState",
    "SamplingParams",
    "SamplingParamsError",
    "TokenLogprob",
    "prompt_logprobs",
    "sample",
    "uniform",
]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token, with its logprobs when they were asked for."""

    token: int
    logprob: PositionLogprobs | None


@dataclass(frozen=True, slots=True)
class SampleError:
    """A row from which no token can be chosen; the other rows are not affected."""

    reason: str


class SamplerState:
    """What sampling remembers of one sequence: which tokens occurred, and how many were put out.

    `output_ids` are tokens put out before, when a sequence goes on elsewhere: the next one is then the same
    as it would have been. `seed` is drawn when the parameters give none; whoever wants to repeat the
    sequence must keep it.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int], output_ids: Iterable[int] = ()) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.num_output = 0
        self._prompt_ids = frozenset(prompt_ids if params.repetition_penalty != 1 else ())
        self._prompt_index = torch.tensor(sorted(self._prompt_ids), dtype=torch.int64)
        self._output_counts: dict[int, int] = {}
        self._max_id = max(self._prompt_ids, default=-1)
        if min(self._prompt_ids, default=0) < 0:
            raise ValueError("prompt_ids: an id is negative")
        for token in output_ids:
            self.observe(token)

    def observe(self, token: int) -> None:
        """Account for a token that was put out."""
        if token < 0:
            raise ValueError(f"token: must be 0 or more, got {token}")
        self.num_output += 1
        if self.params.has_penalties:
            self._output_counts[token] = self._output_counts.get(token, 0) + 1
            self._max_id = max(self._max_id, token)

    def after(self, token: int) -> "SamplerState":
        """A copy that has observed `token` as well; this one has not."""
        copied = copy.copy(self)
        copied._output_counts = dict(self._output_counts)
        copied.observe(token)
        return copied

    def penalize(self, row_V: Tensor) -> None:
        """Apply the penalties to fp32 logits in place: repetition (arXiv 1909.05858, 4.1), then the other two.

        Raises IndexError when the history holds an id that the vocabulary does not have.
        """
        if self._max_id >= row_V.shape[0]:
            raise IndexError(f"token {self._max_id} is outside the vocabulary of {row_V.shape[0]}")
        params = self.params
        output = torch.tensor(list(self._output_counts), dtype=torch.int64)
        if params.repetition_penalty != 1:
            fresh = [token for token in self._output_counts if token not in self._prompt_ids]
            seen = torch.cat([self._prompt_index, torch.tensor(fresh, dtype=torch.int64)])
            values = row_V[seen]
            row_V[seen] = torch.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
        if params.presence_penalty != 0 or params.frequency_penalty != 0:
            counts = torch.tensor(list(self._output_counts.values()), dtype=torch.float32)
            row_V[output] -= params.frequency_penalty * counts + params.presence_penalty


def sample(
    logits_BV: Tensor,
    states: Sequence[SamplerState],
    num_logprobs: Sequence[int | None],
    forbidden_ids: Sequence[Collection[int]] | None = None,
) -> list[Sampled | SampleError]:
    """One token per row, as if each row were alone. Does not `observe` it: that is the caller's decision.

    `num_logprobs[b]` alternatives are reported with row b's token (0: only the token; None: nothing). Ids
    in `forbidden_ids[b]` are not chosen (ids past V cannot be anyway); logprobs still show them. Raises
    ValueError when the arguments do not describe the same number of rows.
    """
    forbidden_ids = [()] * len(states) if forbidden_ids is None else forbidden_ids
    if not logits_BV.shape[0] == len(states) == len(num_logprobs) == len(forbidden_ids):
        raise ValueError(
            f"{logits_BV.shape[0]} rows of logits, {len(states)} states, {len(num_logprobs)} num_logprobs, "
            f"{len(forbidden_ids)} forbidden_ids"
        )
    plain = [
        state.params.is_greedy and not state.params.has_penalties and not forbidden
        for state, forbidden in zip(states, forbidden_ids, strict=True)
    ]
    logits_BV = logits_BV.detach().to("cpu", torch.float32)
    # The first largest of each row, or its first NaN. numpy is many times faster here than torch.
    best = np.argmax(logits_BV.numpy(), axis=1).tolist() if any(plain) else [0] * len(states)
    results: list[Sampled | SampleError] = []
    for row, (state, num) in enumerate(zip(states, num_logprobs, strict=True)):
        try:
            token = best[row] if plain[row] else _choose(logits_BV[row], state, forbidden_ids[row])
            _check_finite(logits_BV[row, token])
            logprob = None if num is None else position_logprobs(logits_BV[row], token, num)
            results.append(Sampled(token, logprob))
        except (LogitsError, IndexError) as error:
            results.append(SampleError(str(error)))
    return results


def _choose(logits_V: Tensor, state: SamplerState, forbidden: Collection[int]) -> int:
    """Penalties, then forbidden ids, then the draw."""
    row_V = logits_V.clone()
    if state.params.has_penalties:
        state.penalize(row_V)
    if forbidden:
        row_V[[token for token in forbidden if 0 <= token < row_V.shape[0]]] = -torch.inf
    _check_finite(row_V.max())
    if state.params.is_greedy:
        return int(row_V.argmax())
    return draw(*candidates(row_V, state.params), uniform(state.seed, state.num_output))


def _check_finite(value: Tensor) -> None:
    if not torch.isfinite(value):
        raise LogitsError(f"logits are not a distribution: their maximum is {value.item()}")
