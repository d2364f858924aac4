"""Cuts one step's batch into microbatches that can take turns, and says how to put their logits together again.

Tokens keep their order: of a sequence that is cut, the earlier tokens are in the earlier microbatch, whose keys and
values are written first as long as the microbatches go through each layer in order. How many there should be is
decided elsewhere.
"""

import itertools
from bisect import bisect_left

from model.batch import ForwardBatch, SequenceSlice


def split_batch(batch: ForwardBatch, count: int) -> tuple[ForwardBatch, ...]:
    """At most `count` batches of about as many tokens each, cut between sequences where that is not far off.

    Their logits, one behind another, are the batch's: `logits_rows` must ascend.

    >>> batch = ForwardBatch.build([[5, 6], [7], [8]], starts=[0, 4, 9], block_tables=[[0], [1], [2]])
    >>> [part.token_ids_T.tolist() for part in split_batch(batch, 2)]
    [[5, 6], [7, 8]]
    """
    rows = batch.logits_rows
    if list(rows) != sorted(rows):
        raise ValueError(f"logits_rows must ascend to be cut, got {list(rows)}")
    cuts = _cuts(batch, count)
    return tuple(_part(batch, start, stop) for start, stop in itertools.pairwise(cuts))


def _cuts(batch: ForwardBatch, count: int) -> list[int]:
    """Token positions of the parts' ends, from 0: those of sequences, where one is within a quarter of a part."""
    total = batch.num_tokens
    ends = [0]
    for item in batch.sequences:
        ends.append(ends[-1] + item.num_tokens)
    size = total / max(1, min(count, total))
    cuts = {0, total}
    for index in range(1, min(count, total)):
        wanted = round(index * size)
        after = bisect_left(ends, wanted)
        nearest = min(ends[max(0, after - 1) : after + 1], key=lambda end: abs(end - wanted))
        cuts.add(nearest if abs(nearest - wanted) <= size / 4 else wanted)
    return sorted(cuts)


def _part(batch: ForwardBatch, start: int, stop: int) -> ForwardBatch:
    sequences: list[SequenceSlice] = []
    at = 0
    for item in batch.sequences:
        first, last = max(start, at), min(stop, at + item.num_tokens)
        if first < last:
            context = item.context_len - (at + item.num_tokens - last)
            sequences.append(SequenceSlice(last - first, context, item.block_table))
        at += item.num_tokens
    rows = tuple(row - start for row in batch.logits_rows if start <= row < stop)
    return ForwardBatch(batch.token_ids_T[start:stop], batch.positions_T[start:stop], tuple(sequences), rows)
