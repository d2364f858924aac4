"""Sends a token once to a replica that holds several of its experts, and takes back one weighted sum.

Only where rows travel, and only where it saves bytes. The combine adds a token's answers in ascending expert id, so a
replica may sum those that come first in that order (all of them, where it gets all): the sum then has the bits that
the coordinator would have got. A replica may get all of an expert's rows or some. What travels is `entries`: a merged
token's row, or a single row with weight 1. Where the sum is made is `actors.expert.merge`.

T tokens, K top-k, N routed rows of the layer, M rows of one message, U its entries, D hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from actors.dispatch.transport import Entries, ExpertRows
from model.dispatch import DispatchPlan

Ints = npt.NDArray[np.int64]

_BYTES_PER_ROW = 8  # what naming a row's entry and weight costs


@dataclass(frozen=True, slots=True, eq=False)
class MergedRows:
    """One message: the rows of `parts`, the entries that they go into, and where the entries' sums belong."""

    parts: tuple[ExpertRows, ...]
    entries: Entries
    tokens: Ints
    single_rows: Ints
    slots_TK: Ints
    prefixes_T: Ints

    def unpack(self, out_UD: torch.Tensor, out_ND: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """Puts the answers where `combine` looks, and weights that make it add the sums as they are."""
        merged = len(self.tokens)
        out_ND[torch.from_numpy(self.single_rows)] = out_UD[merged:]
        out_ND[torch.from_numpy(self.slots_TK[self.tokens, 0])] = out_UD[:merged]
        longest = int(self.prefixes_T[self.tokens].max(initial=0))
        for k in range(longest):
            tokens = self.tokens[self.prefixes_T[self.tokens] > k]
            weights_TK[torch.from_numpy(tokens), k] = 1.0
            if k:
                out_ND[torch.from_numpy(self.slots_TK[tokens, k])] = -0.0  # adding it changes no bit


def merge(plan: DispatchPlan, parts: Sequence[ExpertRows], max_entries: int) -> list[MergedRows]:
    """Messages with all rows of `parts`, in ascending order, for one replica; none where merging saves nothing."""
    routing = _Routing.of(plan, parts)
    held = int(routing.held_TK.sum())
    saved = held - int(routing.entries_T.sum())
    row_bytes = plan.x_TD.shape[1] * plan.x_TD.dtype.itemsize
    if 2 * saved * row_bytes <= held * _BYTES_PER_ROW:
        return []
    return [routing.message(start, stop) for start, stop in _spans(routing.entries_T, max_entries)]


@dataclass(frozen=True, slots=True, eq=False)
class _Routing:
    """A plan as arrays: which slots go to the replica, and how many of a token's first ones (its prefix)."""

    plan: DispatchPlan
    parts: tuple[ExpertRows, ...]
    slots_TK: Ints
    held_TK: npt.NDArray[np.bool_]
    prefixes_T: Ints
    entries_T: Ints

    @classmethod
    def of(cls, plan: DispatchPlan, parts: Sequence[ExpertRows]) -> "_Routing":
        slots_TK = plan.slots_TK.cpu().numpy()
        held_N = np.zeros(plan.num_rows, np.bool_)
        for part in parts:
            held_N[part.rows] = True
        held_TK = held_N[slots_TK]
        prefixes_T = np.cumprod(held_TK, axis=1, dtype=np.int64).sum(axis=1)
        entries_T = held_TK.sum(axis=1) - np.maximum(prefixes_T - 1, 0)
        return cls(plan, tuple(parts), slots_TK, held_TK, prefixes_T, entries_T)

    def message(self, start: int, stop: int) -> MergedRows:
        """The message for tokens start..stop."""
        tokens_N = self.plan.tokens_N.cpu().numpy()
        parts = tuple(self._parts(tokens_N, start, stop))
        rows_M = np.concatenate([np.arange(part.rows.start, part.rows.stop) for part in parts])
        tokens_M = tokens_N[rows_M]
        place_N = np.empty(len(tokens_N), np.int64)
        place_N[self.slots_TK] = np.arange(self.slots_TK.shape[1])
        in_sum_M = (place_N[rows_M] < self.prefixes_T[tokens_M]) & (self.prefixes_T[tokens_M] > 1)
        merged = np.unique(tokens_M[in_sum_M])
        single_rows = rows_M[~in_sum_M]
        entries_M = np.empty(len(rows_M), np.int64)
        entries_M[in_sum_M] = np.searchsorted(merged, tokens_M[in_sum_M])
        entries_M[~in_sum_M] = len(merged) + np.arange(len(single_rows))
        weights_TK = self.plan.weights_TK.cpu().numpy()
        weights_M = np.where(in_sum_M, weights_TK[tokens_M, place_N[rows_M]], np.float32(1.0))
        tokens_U = torch.from_numpy(np.concatenate([merged, tokens_N[single_rows]]))
        x_UD = self.plan.x_TD.index_select(0, tokens_U.to(self.plan.x_TD.device)).to("cpu")
        entries = Entries(x_UD, entries_M, weights_M.astype(np.float32))
        return MergedRows(parts, entries, merged, single_rows, self.slots_TK, self.prefixes_T)

    def _parts(self, tokens_N: Ints, start: int, stop: int) -> Iterator[ExpertRows]:
        for part in self.parts:
            first = part.rows.start
            low, high = (int(at) for at in np.searchsorted(tokens_N[part.rows], (start, stop)))
            if low < high:
                yield ExpertRows(part.expert_id, slice(first + low, first + high))


def _spans(entries_T: Ints, most: int) -> Iterator[tuple[int, int]]:
    """Runs of tokens with at most `most` entries each; runs without any are left out."""
    start = taken = 0
    for token, count in enumerate(entries_T.tolist()):
        if taken and taken + count > most:
            yield start, token
            start, taken = token, 0
        taken += count
    if taken:
        yield start, len(entries_T)
