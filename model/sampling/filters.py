"""From one row of logits to the tokens that may be drawn and their weights: temperature, top-k, top-p, min-p.

One row at a time, on the CPU: nothing here can see another row. Which row is drawn with what randomness is
`model.sampling.sampler`'s work. The filters act in the order of transformers' warpers: temperature, top-k (arXiv
1805.04833), top-p (arXiv 1904.09751), min-p (arXiv 2407.01082), each on what the one before left.
"""

import math

import numpy as np
import torch
from torch import Tensor

from model.sampling.params import SamplingParams

_BLOCK = 64
_FIRST_GUESS = 256


def largest(row_V: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` largest values, and all that equal the last: (values, ids), low ids first among equals.

    Sorts only candidates: the num-th largest of the maxima of blocks cannot exceed the num-th largest value.
    """
    num_blocks = row_V.shape[0] // _BLOCK
    if num < num_blocks // 2:
        maxima = row_V[: num_blocks * _BLOCK].view(num_blocks, _BLOCK).amax(dim=1)
        bound = torch.topk(maxima, num, sorted=False).values.min()
        ids = _where(row_V >= bound)
    else:
        ids = torch.arange(row_V.shape[0])
    values, order = torch.sort(row_V[ids], descending=True, stable=True)
    if num < values.shape[0]:
        kept = int((values >= values[num - 1]).sum())
        values, order = values[:kept], order[:kept]
    return values, ids[order]


def candidates(row_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn: (weights, ids), weights in proportion to their probabilities.

    `row_V` is fp32 with a finite maximum, and `params` are not greedy.
    """
    scaled_V = (row_V - row_V.max()) / params.temperature
    if 0 < params.top_k < row_V.shape[0]:
        values, ids = largest(scaled_V, params.top_k)
        weights = values.exp()
        if params.top_p < 1:
            size = _nucleus_size(weights, params.top_p * float(weights.sum(dtype=torch.float64)))
            weights, ids = weights[:size], ids[:size]
    elif params.top_p < 1:
        weights, ids = _nucleus(torch.log_softmax(scaled_V, dim=-1), params.top_p)
    elif params.min_p > 0:
        ids = _where(scaled_V >= math.log(params.min_p))
        return scaled_V[ids].exp(), ids
    else:
        return scaled_V.exp(), torch.arange(row_V.shape[0])
    keep = weights >= params.min_p * weights.max()
    return weights[keep], ids[keep]


def draw(weights: Tensor, ids: Tensor, u: float) -> int:
    """The id at fraction `u` in [0, 1) of the total weight (inverse of the cumulative distribution)."""
    cumulative = weights.cumsum(0, dtype=torch.float64)
    total = cumulative[-1]
    index = torch.searchsorted(cumulative, total * u, right=True)
    last = torch.searchsorted(cumulative, total)  # the last id with any weight; rounding must not pass it
    return int(ids[torch.minimum(index, last)])


def _nucleus(logprobs_V: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest most likely tokens that hold `top_p` of the mass, low ids first if equal: (weights, ids)."""
    values, ids = largest(logprobs_V, _FIRST_GUESS)
    weights = values.exp()
    if float(weights.sum(dtype=torch.float64)) >= top_p:
        size = _nucleus_size(weights, top_p)
        return weights[:size], ids[:size]
    # A flat distribution: sort values alone (numpy does that many times faster), then find whose they are.
    descending = torch.from_numpy(np.sort(logprobs_V.numpy())).flip(0)
    size = _nucleus_size(descending.exp(), top_p)
    cut = descending[size - 1]
    above, equal = _where(logprobs_V > cut), _where(logprobs_V == cut)
    ids = torch.cat([above, equal[: size - above.shape[0]]])
    return logprobs_V[ids].exp(), ids


def _nucleus_size(weights: Tensor, mass: float) -> int:
    """How many of the descending `weights` reach `mass`: those with less than it before them."""
    cumulative = weights.cumsum(0, dtype=torch.float64)
    return 1 + int((cumulative[:-1] < mass).sum())


def _where(mask: Tensor) -> Tensor:
    """Indices of True, ascending (numpy's is several times faster than torch's)."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))
