"""A deterministic stand-in for the model: the next token depends on all before it, read from a paged cache.

The cache is as real as it gets without tensors: KV blocks of cells, and in each all that its position depends on: the
root of those that may share it, and the tokens up to it, as they were read from the cell before when it was written.
A block that is lent to a stranger, freed too early, forgotten, or shared before it is whole shows as a wrong read.
"""

import zlib
from collections.abc import Sequence as Items

from cluster.ids import SequenceId
from cluster.scheduler import ScheduledBatch, ScheduledSequence
from cluster.sequence import Sequence

VOCABULARY = 13
EOS = 3


def next_token(tokens: Items[int], forbidden: frozenset[int] = frozenset()) -> int:
    """A token that depends on all of `tokens` and their order, and is not forbidden. It often repeats what it said."""
    draw = zlib.crc32(repr(list(tokens)).encode())
    token = draw % VOCABULARY
    if tokens[-1] in tokens[:-1] and draw // VOCABULARY % 4:
        token = tokens[len(tokens) - 1 - list(reversed(tokens[:-1])).index(tokens[-1])]
    while token in forbidden:
        token = (token + 1) % VOCABULARY
    return token


def expected_output(sequence: Sequence, max_model_len: int) -> list[int]:
    """What an engine with unlimited memory generates, one token at a time."""
    stop_ids = set(sequence.stop_token_ids) | (set() if sequence.ignore_eos else set(sequence.eos_token_ids))
    output: list[int] = []
    while len(output) < sequence.max_tokens and sequence.num_prompt + len(output) < max_model_len:
        forbidden = frozenset(stop_ids) if len(output) < sequence.min_tokens else frozenset()
        output.append(next_token([*sequence.prompt_ids, *output], forbidden))
        if output[-1] in stop_ids:
            break
    return output


class PagedFakeModel:
    """Runs scheduled batches over `num_blocks` blocks of `block_size` cells."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._cells: list[tuple[bytes | int, ...] | None] = [None] * (num_blocks * block_size)

    def write(self, batch: ScheduledBatch) -> None:
        """The first half of a step: what the batch's tokens leave in the cache."""
        for item in batch.items:
            before = self._read(item, item.start - 1) if item.start else (item.sequence.prefix_root,)
            for offset, token in enumerate(item.token_ids):
                before = (*before, token)
                self._cells[self._cell(item, item.start + offset)] = before

    def sample(self, batch: ScheduledBatch) -> dict[SequenceId, list[int]]:
        """The second half: read each sequence's whole context back, and choose its next token.

        Where that is the first guess, the next but one is chosen too, and so on.
        """
        tokens: dict[SequenceId, list[int]] = {}
        for item in batch.items:
            context = [*item.sequence.token_ids(0, item.start), *item.token_ids]
            for position in range(item.stop):
                found = self._read(item, position)
                wanted = (item.sequence.prefix_root, *context[: position + 1])
                assert found == wanted, f"position {position} of {item} was overwritten: {found}"
            if item.needs_token and not item.sequence.is_finished:
                tokens[item.sequence.seq_id] = self._sample(item, context)
        return tokens

    def _sample(self, item: ScheduledSequence, context: list[int]) -> list[int]:
        tokens: list[int] = []
        while True:
            seen = context[: item.known_stop + len(tokens)]
            tokens.append(next_token(seen, item.sequence.forbidden_ids(len(tokens))))
            if len(tokens) > item.num_draft or tokens[-1] != item.draft_ids[len(tokens) - 1]:
                return tokens

    def _cell(self, item: ScheduledSequence, position: int) -> int:
        block = item.block_table[position // self._block_size]
        return block * self._block_size + position % self._block_size

    def _read(self, item: ScheduledSequence, position: int) -> tuple[bytes | int, ...]:
        cell = self._cells[self._cell(item, position)]
        assert cell is not None, (item, position)
        return cell
