"""A batch cut into microbatches says the same: every token, its place and its blocks; and computes the same bits."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.microbatch import split_batch
from model.numerics import same_bits
from model.storage.checkpoint import Checkpoint
from model.transformer import load_local, run_local
from tests.support.checkpoints import write_mixtral


def batch_of(lengths: Sequence[int], starts: Sequence[int], rows: Sequence[int] | None = None) -> ForwardBatch:
    tokens = [[100 * index + at for at in range(length)] for index, length in enumerate(lengths)]
    tables = [[index] for index in range(len(lengths))]
    return ForwardBatch.build(tokens, starts, tables, rows)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    count=st.integers(1, 5),
    data=st.data(),
)
def test_parts_are_the_whole(lengths: list[int], count: int, data: st.DataObject) -> None:
    starts = [data.draw(st.integers(0, 9)) for _ in lengths]
    total = sum(lengths)
    rows = sorted(data.draw(st.sets(st.integers(0, total - 1))))
    batch = batch_of(lengths, starts, rows)
    parts = split_batch(batch, count)
    assert len(parts) == min(count, total)
    assert torch.equal(torch.cat([part.token_ids_T for part in parts]), batch.token_ids_T)
    assert torch.equal(torch.cat([part.positions_T for part in parts]), batch.positions_T)
    wanted = [int(part.token_ids_T[row]) for part in parts for row in part.logits_rows]
    assert wanted == [int(batch.token_ids_T[row]) for row in rows]
    for part in parts:
        assert sum(item.num_tokens for item in part.sequences) == part.num_tokens
        spelled = [position for item in part.sequences for position in range(item.start, item.context_len)]
        assert part.positions_T.tolist() == spelled
    largest, smallest = max(part.num_tokens for part in parts), min(part.num_tokens for part in parts)
    assert largest - smallest <= total / len(parts) + 1


def test_a_cut_falls_between_sequences_where_one_is_near() -> None:
    assert [part.num_tokens for part in split_batch(batch_of([5, 3, 4], [0, 0, 0]), 2)] == [5, 7]
    assert [part.num_tokens for part in split_batch(batch_of([1, 11], [0, 0]), 2)] == [6, 6]


def test_rows_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="must ascend"):
        split_batch(batch_of([3, 3], [0, 0], [4, 1]), 2)


def test_microbatches_in_turns_give_the_same_bits(tmp_path: Path) -> None:
    write_mixtral(tmp_path, hidden=64, ffn=96, layers=3, experts=4, dtype=torch.float16)
    backbone, experts = load_local(Checkpoint.open(tmp_path))
    lengths, starts = [40, 1, 1, 7, 1], [0, 0, 0, 0, 0]
    tokens = [[(7 * index + 3 * at) % 100 for at in range(length)] for index, length in enumerate(lengths)]
    tables = [[2 * index, 2 * index + 1] for index in range(len(lengths))]
    batch = ForwardBatch.build(tokens, starts, tables, list(range(sum(lengths))))
    whole = run_local(backbone, batch, KVCache(backbone.config, 10, 32), experts)
    for count in (2, 3, 5):
        kv = KVCache(backbone.config, 10, 32)
        running = [backbone.forward(part, kv) for part in split_batch(batch, count)]
        calls = [next(one) for one in running]
        logits: list[torch.Tensor] = []
        while len(logits) < len(running):
            for index, one in enumerate(running):
                try:
                    calls[index] = one.send(experts.run(calls[index].layer, calls[index].plan))
                except StopIteration as stop:
                    logits.append(stop.value)
        assert same_bits(torch.cat(logits), whole), count
