"""Sending tokens to experts and putting the answers back: dispatch, the frozen plan, combine.

The plan travels with the rows and is all that is needed to undo the sort. Who computes the rows, and where,
is left to `model.experts` and to the remote twin of it.

Tensor suffixes: T tokens, D model dim, E experts, K top-k, N = T*K routed rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.device_calls import upload

_FEW_TOKENS = 2


@dataclass(frozen=True, slots=True, eq=False)
class DispatchPlan:
    """Which row of which token goes to which expert, sorted by expert and then by token, and how to undo that.

    Routed row n is token `tokens_N[n]` of `x_TD`; `counts[e]` rows belong to expert e. Token t's answers are the
    rows `slots_TK[t]`, in ascending expert id, to be weighted by `weights_TK[t]`. With one expert (a dense model)
    the rows are the tokens, in their order.
    """

    x_TD: Tensor
    tokens_N: Tensor
    counts: tuple[int, ...]
    slots_TK: Tensor
    weights_TK: Tensor

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.tokens_N)

    @property
    def x_ND(self) -> Tensor:
        """The routed rows, gathered anew at each call; a dense model's are x_TD itself."""
        return self.x_TD if len(self.counts) == 1 else self.x_TD.index_select(0, self.tokens_N)

    def gather(self, out_ND: Tensor) -> None:
        """Writes the routed rows to `out_ND`, say, to memory that an expert reads too."""
        if self.x_TD.device == out_ND.device and len(self.counts) > 1:
            torch.index_select(self.x_TD, 0, self.tokens_N, out=out_ND)
        else:
            out_ND.copy_(self.x_ND)

    def rows(self, expert: int) -> slice:
        """The routed rows that belong to `expert`."""
        if not 0 <= expert < len(self.counts):
            raise IndexError(f"expert {expert} is not one of the plan's {len(self.counts)}")
        start = sum(self.counts[:expert])
        return slice(start, start + self.counts[expert])


@torch.no_grad()
def dispatch(x_TD: Tensor, logits_TE: Tensor, top_k: int) -> DispatchPlan:
    """Choose each token's `top_k` experts and sort the rows by expert.

    The weights are the softmax, in fp32, of the chosen logits only, and so sum to 1 (arXiv 2401.04088,
    section 2.1; transformers' Mixtral normalises the same way). With `top_k` 1 the weight is therefore
    exactly 1.0; the Switch Transformer (arXiv 2101.03961, eq. 2) would scale by the router's probability
    instead. Equal logits prefer the lower expert id.
    """
    num_experts = logits_TE.shape[1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be between 1 and the number of experts ({num_experts}), got {top_k}")
    if num_experts == 1:
        return _dense(x_TD)
    if len(x_TD) <= _FEW_TOKENS:
        return _dispatch_few(x_TD, logits_TE.tolist(), top_k)
    scores_TE = logits_TE.to("cpu", torch.float32).numpy()
    experts_TK = np.argsort(-scores_TE, axis=1, kind="stable")[:, :top_k]
    experts_TK.sort(axis=1)
    order_N = experts_TK.ravel().argsort(kind="stable")
    slots_N = np.empty_like(order_N)
    slots_N[order_N] = np.arange(order_N.size)
    chosen_TK = torch.from_numpy(scores_TE[np.arange(len(scores_TE))[:, None], experts_TK])
    counts = tuple(np.bincount(experts_TK.ravel(), minlength=num_experts).tolist())
    tokens_N, slots_TK = torch.from_numpy(order_N // top_k), torch.from_numpy(slots_N.reshape(experts_TK.shape))
    return _plan(x_TD, tokens_N, counts, slots_TK, chosen_TK)


def _dispatch_few(x_TD: Tensor, scores_TE: list[list[float]], top_k: int) -> DispatchPlan:
    """The same in plain Python: for a token or two that is three times quicker than a dozen calls into numpy."""
    num_experts = len(scores_TE[0])
    experts_TK = [sorted(sorted(range(num_experts), key=row.__getitem__, reverse=True)[:top_k]) for row in scores_TE]
    routed = sorted((expert, token, k) for token, row in enumerate(experts_TK) for k, expert in enumerate(row))
    slots_TK = [[0] * top_k for _ in scores_TE]
    counts = [0] * num_experts
    for slot, (expert, token, k) in enumerate(routed):
        slots_TK[token][k] = slot
        counts[expert] += 1
    chosen_TK = [[scores[expert] for expert in row] for scores, row in zip(scores_TE, experts_TK, strict=True)]
    tokens_N = torch.tensor([token for _, token, _ in routed])
    return _plan(x_TD, tokens_N, tuple(counts), torch.tensor(slots_TK), torch.tensor(chosen_TK, dtype=torch.float32))


def _plan(x_TD: Tensor, tokens_N: Tensor, counts: tuple[int, ...], slots_TK: Tensor, chosen_TK: Tensor) -> DispatchPlan:
    """The plan, where x_TD is. To a GPU goes one copy: each costs about as much as a small kernel."""
    weights_TK = torch.softmax(chosen_TK, dim=-1)
    if x_TD.is_cuda:
        parts = (tokens_N, slots_TK, weights_TK)
        sent = upload(torch.cat([part.view(-1).view(torch.uint8) for part in parts]), x_TD.device)
        ends = [tokens_N.nbytes, tokens_N.nbytes + slots_TK.nbytes]
        tokens_N = sent[: ends[0]].view(torch.int64)
        slots_TK = sent[ends[0] : ends[1]].view(torch.int64).view(slots_TK.shape)
        weights_TK = sent[ends[1] :].view(torch.float32).view(weights_TK.shape)
    return DispatchPlan(x_TD, tokens_N, counts, slots_TK, weights_TK)


def _dense(x_TD: Tensor) -> DispatchPlan:
    tokens_N = torch.arange(len(x_TD), device=x_TD.device)
    weights_TK = torch.ones(len(x_TD), 1, device=x_TD.device)
    return DispatchPlan(x_TD, tokens_N, (len(x_TD),), tokens_N.unsqueeze(1), weights_TK)


@dataclass(frozen=True, slots=True, eq=False)
class WeightedAnswers:
    """Answers some of which were summed where they were computed; `weights_TK` replaces the plan's.

    A token's first slot then holds the sum, with weight 1, the others that went into it -0.0, which adds nothing.
    """

    out_ND: Tensor
    weights_TK: Tensor


Answers = Tensor | WeightedAnswers
"""What experts give back: out_ND, or with other weights."""


@torch.no_grad()
def combine(answers: Answers, plan: DispatchPlan) -> Tensor:
    """y_TD: each token's weighted sum over its experts, in fp32 and in ascending expert id.

    The order is fixed because (a + b) + c and (a + c) + b differ in their last bits.
    """
    if isinstance(answers, WeightedAnswers):
        out_ND, weights_TK = answers.out_ND, answers.weights_TK.to(plan.weights_TK.device)
    else:
        out_ND, weights_TK = answers, plan.weights_TK
    expected = (plan.num_rows, plan.x_TD.shape[1])
    if out_ND.shape != expected:
        raise ValueError(f"experts answered with shape {tuple(out_ND.shape)}, expected {expected}")
    out_ND = out_ND.to(plan.x_TD.device, torch.float32)
    if len(plan.counts) == 1:
        return out_ND
    tokens, top_k = plan.slots_TK.shape
    y_TKD = out_ND.index_select(0, plan.slots_TK.reshape(-1)).view(tokens, top_k, -1).mul_(weights_TK.unsqueeze(-1))
    y_TD = y_TKD[:, 0]
    for k in range(1, top_k):
        y_TD = torch.add(y_TD, y_TKD[:, k])
    return y_TD.contiguous()
