"""The tokens of one step, flat and without padding, as plain values.

Which sequences are in a step is the scheduler's decision; what the numbers mean is the model's.

Tensor suffixes: T tokens of the step, over all sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """One sequence's tokens in this step.

    `context_len` counts the sequence's positions up to and including these tokens; position p lives in block
    `block_table[p // block_size]`.
    """

    num_tokens: int
    context_len: int
    block_table: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.num_tokens <= self.context_len:
            raise ValueError(
                f"num_tokens must be between 1 and context_len ({self.context_len}), got {self.num_tokens}"
            )

    @property
    def start(self) -> int:
        """Position of the first token of the slice."""
        return self.context_len - self.num_tokens


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBatch:
    """One step: tokens and positions of `sequences`, in order, and the rows whose logits are wanted."""

    token_ids_T: Tensor
    positions_T: Tensor
    sequences: tuple[SequenceSlice, ...]
    logits_rows: tuple[int, ...]

    @classmethod
    def build(
        cls,
        token_ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        logits_rows: Sequence[int] | None = None,
    ) -> "ForwardBatch":
        """From python lists: per sequence its new tokens, the position of the first, and its blocks.

        Without `logits_rows`, the last row of every sequence is asked for.

        >>> batch = ForwardBatch.build([[5, 6, 7], [9]], starts=[0, 4], block_tables=[[0], [3]])
        >>> batch.positions_T.tolist(), batch.logits_rows
        ([0, 1, 2, 4], (2, 3))
        """
        sequences = tuple(
            SequenceSlice(len(ids), start + len(ids), tuple(table))
            for ids, start, table in zip(token_ids, starts, block_tables, strict=True)
        )
        if not sequences:
            raise ValueError("a batch needs at least one sequence")
        flat = [token for ids in token_ids for token in ids]
        positions = [position for item in sequences for position in range(item.start, item.context_len)]
        if logits_rows is None:
            ends, total = [], 0
            for item in sequences:
                total += item.num_tokens
                ends.append(total - 1)
            logits_rows = ends
        if any(not 0 <= row < len(flat) for row in logits_rows):
            raise ValueError(f"logits_rows must lie in 0..{len(flat) - 1}, got {list(logits_rows)}")
        return cls(torch.tensor(flat), torch.tensor(positions), sequences, tuple(logits_rows))

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids_T)
