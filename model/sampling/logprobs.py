"""Log-probabilities to report: of the model's own distribution, before penalties, temperature or filters.

Each position is computed by itself, so what is reported of a token does not depend on its neighbours in a
batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.sampling.filters import largest
from model.sampling.reported import PositionLogprobs, TokenLogprob


class LogitsError(ValueError):
    """Logits that are no distribution: NaN, +inf, or nothing but -inf."""


def position_logprobs(logits_V: Tensor, token: int, num: int) -> PositionLogprobs:
    """One row: log-softmax in fp32, and `num` alternatives (at most V). Raises LogitsError, IndexError."""
    if not 0 <= token < logits_V.shape[0]:
        raise IndexError(f"token {token} is outside the vocabulary of {logits_V.shape[0]}")
    row_V = logits_V.to("cpu", torch.float32, copy=True)
    if not torch.isfinite(row_V.max()):
        raise LogitsError(f"logits are not a distribution: their maximum is {row_V.max().item()}")
    logprobs_V = torch.log_softmax(row_V, dim=-1)
    chosen = logprobs_V[token]
    rank = int(torch.count_nonzero(logprobs_V > chosen)) + 1
    return PositionLogprobs(TokenLogprob(token, chosen.item(), rank), _top(logprobs_V, num))


def prompt_logprobs(logits_PV: Tensor, target_ids: Sequence[int], num: int) -> list[PositionLogprobs]:
    """What the model thought of each token of a prompt: row p of `logits_PV` predicts `target_ids[p]`."""
    if len(target_ids) != logits_PV.shape[0]:
        raise ValueError(f"{logits_PV.shape[0]} rows of logits for {len(target_ids)} target ids")
    return [position_logprobs(row_V, token, num) for row_V, token in zip(logits_PV, target_ids, strict=True)]


def _top(logprobs_V: Tensor, num: int) -> tuple[TokenLogprob, ...]:
    if num <= 0:
        return ()
    values, ids = largest(logprobs_V, num)
    top: list[TokenLogprob] = []
    for index, (token, logprob) in enumerate(zip(ids[:num].tolist(), values[:num].tolist(), strict=True)):
        same = bool(top) and top[-1].logprob == logprob
        top.append(TokenLogprob(token, logprob, top[-1].rank if same else index + 1))
    return tuple(top)
