"""Chooses each sequence's next token from its logits.

A row's token and logprobs depend on its own logits, parameters, history and seed, never on the rest of the
batch: rows that draw are computed one at a time, and the only batched operation is argmax, which does not
round. Bad logits in one row become a `SampleError` in its place. Which tokens end a sequence is the
scheduler's knowledge.
"""

import copy
import math
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.sampling.filters import candidates, draw
from model.sampling.logprobs import (
    LogitsError,
    position_logprobs,
    prompt_logprobs,
)
from model.sampling.masks import Masked, MaskError
from model.sampling.params import SamplingParams, SamplingParamsError, uniform
from model.sampling.reported import PositionLogprobs, TokenLogprob

__all__ = [
    "LogitsError",
    "Masked",
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
    """A row from which no token can be chosen; the other rows are not affected.

    `by_request` is True where the model is well and the request leaves no token that may come.
    """

    reason: str
    by_request: bool = False


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
        self._bias = _Bias(params) if params.logit_bias else None
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

    def adjust(self, row_V: Tensor) -> None:
        """Apply the bias, then the penalties, to fp32 logits in place.

        Raises IndexError when either holds an id that the vocabulary does not have.
        """
        if self._bias is not None:
            self._bias.add_to(row_V)
        if self.params.has_penalties:
            self._penalize(row_V)

    def _penalize(self, row_V: Tensor) -> None:
        """Repetition (arXiv 1909.05858, 4.1), then the other two."""
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


class _Bias:
    """`logit_bias` as tensors."""

    def __init__(self, params: SamplingParams) -> None:
        ids, values = zip(*params.logit_bias, strict=True)
        self._max_id = max(ids)
        self._ids = torch.tensor(ids, dtype=torch.int64)
        self._values = torch.tensor(values, dtype=torch.float32)

    def add_to(self, row_V: Tensor) -> None:
        if self._max_id >= row_V.shape[0]:
            raise IndexError(f"logit_bias: token {self._max_id} is outside the vocabulary of {row_V.shape[0]}")
        row_V[self._ids] += self._values


def sample(
    logits_BV: Tensor,
    states: Sequence[SamplerState],
    num_logprobs: Sequence[int | None],
    forbidden_ids: Sequence[Collection[int]] | None = None,
    allowed_ids: Sequence[Tensor | None] | None = None,
    *,
    masked: Sequence[Masked | None] | None = None,
) -> list[Sampled | SampleError]:
    """One token per row, as if each row were alone. Does not `observe` it: that is the caller's decision.

    `num_logprobs[b]` alternatives are reported with row b's token (0: only the token; None: nothing). Ids
    in `forbidden_ids[b]` are not chosen (ids past V cannot be anyway), nor what `masked[b]` forbids, nor those that are
    not in `allowed_ids[b]` (ascending, int64, below V; None allows all); logprobs still show them. Raises ValueError
    when the arguments do not describe the same number of rows.
    """
    forbidden_ids = [()] * len(states) if forbidden_ids is None else forbidden_ids
    masked = [None] * len(states) if masked is None else masked
    allowed_ids = [None] * len(states) if allowed_ids is None else allowed_ids
    given = (len(states), len(num_logprobs), len(forbidden_ids), len(masked), len(allowed_ids))
    if any(one != logits_BV.shape[0] for one in given):
        raise ValueError(
            f"{logits_BV.shape[0]} rows of logits, {len(states)} states, {len(num_logprobs)} num_logprobs, "
            f"{len(forbidden_ids)} forbidden_ids, {len(masked)} masked, {len(allowed_ids)} allowed_ids"
        )
    plain = [
        state.params.is_greedy and not state.params.changes_logits and not (forbidden or mask or allowed is not None)
        for state, forbidden, mask, allowed in zip(states, forbidden_ids, masked, allowed_ids, strict=True)
    ]
    if logits_BV.is_cuda and all(plain) and all(num is None for num in num_logprobs):
        return _likeliest(logits_BV)
    logits_BV = logits_BV.detach().to("cpu", torch.float32)
    # The first largest of each row, or its first NaN. numpy is many times faster here than torch.
    best = np.argmax(logits_BV.numpy(), axis=1).tolist() if any(plain) else [0] * len(states)
    results: list[Sampled | SampleError] = []
    for row, (state, num) in enumerate(zip(states, num_logprobs, strict=True)):
        try:
            if plain[row]:
                token = best[row]
            else:
                token = _choose(logits_BV[row], state, forbidden_ids[row], masked[row], allowed_ids[row])
            _check_finite(logits_BV[row, token])
            logprob = None if num is None else position_logprobs(logits_BV[row], token, num)
            results.append(Sampled(token, logprob))
        except (LogitsError, IndexError) as error:
            results.append(SampleError(str(error)))
        except MaskError as error:
            results.append(SampleError(str(error), by_request=True))
    return results


def _likeliest(logits_BV: Tensor) -> list[Sampled | SampleError]:
    """The same for rows of which nothing else is wanted, where they are: a GPU's logits take longer to fetch."""
    best_B = logits_BV.argmax(dim=1)  # the first largest, or the first NaN
    peaks_B = logits_BV.gather(1, best_B[:, None])[:, 0]
    found: list[Sampled | SampleError] = []
    for token, peak in zip(best_B.tolist(), peaks_B.tolist(), strict=True):
        if math.isfinite(peak):
            found.append(Sampled(token, None))
        else:
            found.append(SampleError(f"logits are not a distribution: their maximum is {peak}"))
    return found


def _choose(
    logits_V: Tensor,
    state: SamplerState,
    forbidden: Collection[int],
    masked: Masked | None,
    allowed: Tensor | None,
) -> int:
    """Bias and penalties, then what is forbidden or not allowed, then the draw."""
    row_V = logits_V.clone()
    if state.params.changes_logits:
        state.adjust(row_V)
    _check_finite(row_V.max())
    if forbidden:
        row_V[[token for token in forbidden if 0 <= token < row_V.shape[0]]] = -torch.inf
    if masked is not None:
        masked.apply(row_V)
    open_V = row_V if allowed is None else row_V[allowed]
    if open_V.numel() == 0 or open_V.max() == -torch.inf:
        raise MaskError("no token may come next: what the request forbids leaves none")
    token = _draw(open_V, state)
    return token if allowed is None else int(allowed[token])


def _draw(row_V: Tensor, state: SamplerState) -> int:
    """The index of the likeliest, or of one that is drawn."""
    if state.params.is_greedy:
        return int(row_V.argmax())
    return draw(*candidates(row_V, state.params), uniform(state.seed, state.num_output))


def _check_finite(value: Tensor) -> None:
    if not torch.isfinite(value):
        raise LogitsError(f"logits are not a distribution: their maximum is {value.item()}")
