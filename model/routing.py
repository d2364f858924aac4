"""Which experts each token took, read back from the dispatch plans of a forward pass.

A plan knows it in a form that serves sending and combining; this is the form that people and files want. Nothing is
computed while a layer runs: what it leaves behind is kept, and put in order for all layers at once.

Tensor suffixes: L layers, T tokens, K top-k, E experts.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.dispatch import DispatchPlan
from model.expert_ids import ExpertIds, id_dtype


class RoutingCapture:
    """The choices of one microbatch, layer by layer."""

    __slots__ = ("_counts_LE", "_slots_LTK", "_weights_LTK")

    def __init__(self) -> None:
        self._slots_LTK: list[Tensor] = []
        self._weights_LTK: list[Tensor] = []
        self._counts_LE: list[tuple[int, ...]] = []

    def note(self, plan: DispatchPlan) -> None:
        """Keeps the next layer's choices, not its rows."""
        self._slots_LTK.append(plan.slots_TK)
        self._weights_LTK.append(plan.weights_TK)
        self._counts_LE.append(plan.counts)

    def experts_TLK(self) -> ExpertIds:
        """Expert ids of each token in each layer: the weightiest first, of equal weights the lower id."""
        slots_LTK = torch.stack(self._slots_LTK).cpu().numpy()
        layers, tokens, top_k = slots_LTK.shape
        counts_LE = np.array(self._counts_LE)
        num_experts = counts_LE.shape[1]
        ids = np.arange(num_experts, dtype=id_dtype(num_experts))
        expert_of_row = np.repeat(np.tile(ids, layers), counts_LE.ravel())
        chosen_LTK = expert_of_row[slots_LTK + np.arange(layers)[:, None, None] * (tokens * top_k)]
        if top_k > 1:
            weights_LTK = torch.stack(self._weights_LTK).cpu().numpy()
            order_LTK = np.argsort(-weights_LTK, axis=2, kind="stable")
            chosen_LTK = np.take_along_axis(chosen_LTK, order_LTK, axis=2)
        return np.ascontiguousarray(chosen_LTK.transpose(1, 0, 2))


def experts_of(captures: Sequence[RoutingCapture]) -> ExpertIds:
    """Expert ids of all tokens of a step, shape (T, L, K), its microbatches one behind another."""
    parts = [capture.experts_TLK() for capture in captures]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
