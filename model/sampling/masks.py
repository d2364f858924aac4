"""Which tokens may come next in one sequence, asked about the output so far.

The seam for everything that forbids tokens: a mask changes one row of logits in place and sees nothing else. It is
asked anew for every token with the whole output before it, so preemption, guessing ahead and going on elsewhere need
nothing of it. Two masks live here; a grammar is another. When they act is `model.sampling.sampler`'s knowledge.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class MaskError(ValueError):
    """A mask that cannot say what may come next; the message is for whoever sent the request."""


class TokenMask(Protocol):
    """One sequence's rule for its next token.

    A mask may remember what it worked out about an output, but what it does may depend only on `output_ids`: the next
    call may have more tokens than the last, fewer, or the same ones again.
    """

    def apply(self, row_V: Tensor, output_ids: Sequence[int]) -> None:
        """Sets the logits (V, fp32, on the CPU) of what may not follow `output_ids` to -inf, and changes no other.

        `output_ids` is only lent: it grows after the call. Raises MaskError.
        """


@dataclass(frozen=True, slots=True)
class Masked:
    """One row's masks, all of which hold, and the output after which its token is drawn."""

    masks: tuple[TokenMask, ...]
    output_ids: Sequence[int]

    def apply(self, row_V: Tensor) -> None:
        """Each mask in turn; their order does not matter. Raises MaskError."""
        for mask in self.masks:
            mask.apply(row_V, self.output_ids)


class OnlyTokens:
    """Nothing but these ids: vLLM's `allowed_token_ids`. The end of sequence must be among them to be chosen."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        self._ids = torch.tensor(sorted(set(token_ids)), dtype=torch.int64)
        if not self._ids.numel() or int(self._ids[0]) < 0:
            raise ValueError("token_ids: must be one id or more, none of them negative")

    def apply(self, row_V: Tensor, output_ids: Sequence[int]) -> None:
        """As in TokenMask; ids past V cannot be chosen anyway."""
        ids = self._ids if int(self._ids[-1]) < row_V.shape[0] else self._ids[self._ids < row_V.shape[0]]
        kept = row_V[ids]
        row_V.fill_(-torch.inf)
        row_V[ids] = kept


class BadWords:
    """No output in which one of `words`, each a series of ids, is complete: vLLM's `bad_words`.

    Only the last id of a word is forbidden, after the others of it. The prompt does not count.
    """

    def __init__(self, words: Iterable[Sequence[int]]) -> None:
        self._always: list[int] = []
        self._after: dict[int, list[tuple[list[int], int]]] = {}  # by the last id before the forbidden one
        for *before, last in words:
            if before:
                self._after.setdefault(before[-1], []).append((before, last))
            else:
                self._always.append(last)

    def apply(self, row_V: Tensor, output_ids: Sequence[int]) -> None:
        """As in TokenMask."""
        forbidden = list(self._always)
        for before, last in self._after.get(output_ids[-1], ()) if output_ids else ():
            if list(output_ids[-len(before) :]) == before:
                forbidden.append(last)
        if forbidden:
            row_V[[token for token in forbidden if token < row_V.shape[0]]] = -torch.inf
