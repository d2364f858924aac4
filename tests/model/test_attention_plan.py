"""What a plan reads and writes: blocks, slots, masks and jobs, by hand; the arithmetic is tested elsewhere."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention_plan import KEY_SPAN, AttentionPlan, AttentionShape, Masks, plan_attention
from model.batch import ForwardBatch
from model.numerics import RowClass

BLOCK = 32


def shape(*, window: int | None = None, batches: Sequence[int] = (1, 2, 3, 4, 8), width: int = 8) -> AttentionShape:
    return AttentionShape(
        head_dim=width,
        num_kv_heads=1,
        heads_per_kv=2,
        window=window,
        token_class=RowClass((1, 4, 16)),
        key_class=RowClass((32, 64, 128, KEY_SPAN)),
        batch_class=RowClass(tuple(batches)),
    )


def plan(slices: Sequence[tuple[int, int]], of: AttentionShape | None = None, first_block: int = 10) -> AttentionPlan:
    """For sequences of (first position, new tokens), with blocks numbered from `first_block` on."""
    of = of or shape()
    tables, at = [], first_block
    for start, count in slices:
        blocks = -(-(start + count) // BLOCK)
        tables.append(range(at, at + blocks))
        at += blocks
    batch = ForwardBatch.build([[0] * count for _, count in slices], [start for start, _ in slices], tables)
    return plan_attention(batch, BLOCK, of, Masks(of, "cpu"), "cpu")


def listed(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else tensor.tolist()


def test_slots_are_where_the_block_table_says() -> None:
    assert plan([(30, 4), (0, 1)]).slots_T.tolist() == [10 * 32 + 30, 10 * 32 + 31, 11 * 32, 11 * 32 + 1, 12 * 32]


def test_a_block_that_is_begun_is_cleared_behind_the_last_token() -> None:
    assert listed(plan([(0, 30)]).cleared) == [10 * 32 + 30, 10 * 32 + 31]
    assert listed(plan([(20, 40)]).cleared) == list(range(11 * 32 + 28, 12 * 32))
    assert listed(plan([(31, 1)]).cleared) is None
    assert listed(plan([(5, 1)]).cleared) is None
    assert listed(plan([(0, 64)]).cleared) is None
    assert len(listed(plan([(32, 1), (5, 1), (64, 1)]).cleared) or []) == 31 * 2


def test_decodes_share_a_job_and_keep_their_order_where_they_can() -> None:
    step = plan([(40, 1), (50, 1), (63, 1)])
    assert len(step.jobs) == 1
    assert (step.gathered_P, step.restored_T, step.num_rows) == (None, None, 3)
    assert step.jobs[0].blocks.tolist() == [10, 11, 12, 13, 14, 15]
    assert step.jobs[0].pieces[0].keys == slice(0, 64)


def test_longer_sequences_come_first_and_answers_return_to_their_tokens() -> None:
    step = plan([(10, 1), (100, 1), (40, 1)])
    assert listed(step.gathered_P) == [1, 2, 0]
    assert listed(step.restored_T) == [2, 0, 1]


def test_missing_blocks_are_stood_in_for_by_the_sequences_own_last() -> None:
    step = plan([(100, 1), (40, 1)])
    assert step.jobs[0].blocks.tolist() == [10, 11, 12, 13, 14, 15, 15, 15]


def test_blocks_behind_the_last_token_are_not_read() -> None:
    of = shape()
    batch = ForwardBatch.build([[0]], [40], [[7, 8, 9, 6]])
    assert plan_attention(batch, BLOCK, of, Masks(of, "cpu"), "cpu").jobs[0].blocks.tolist() == [7, 8]


def test_equal_prompts_are_answered_together_each_piece_with_the_keys_it_sees() -> None:
    (job,) = plan([(0, 40)] * 4).jobs
    assert (job.num_sequences, job.num_tokens, job.rows) == (4, 16 + 16 + 16, slice(0, 192))
    assert [(piece.tokens, piece.keys.stop) for piece in job.pieces] == [
        (slice(0, 16), 32),
        (slice(16, 32), 32),
        (slice(32, 48), 64),
    ]
    assert [len(piece.mask) for piece in job.pieces] == [1, 1, 1]


def test_sequences_of_very_different_lengths_do_not_share() -> None:
    assert len(plan([(4000, 1), (10, 1)], shape(width=64)).jobs) == 2
    assert len(plan([(100, 1), (10, 1)], shape(width=64)).jobs) == 1


def test_a_job_has_only_as_many_sequences_as_are_allowed_together() -> None:
    assert [job.num_sequences for job in plan([(9, 1)] * 7, shape(batches=(1, 3))).jobs] == [3, 3, 1]
    assert [job.num_sequences for job in plan([(2000, 1)] * 3, shape(width=512)).jobs] == [1, 1, 1]


def test_a_window_skips_whole_spans_only() -> None:
    step = plan([(1200, 20)], shape(window=300))
    (job,) = step.jobs
    assert job.blocks[0] == 10 + KEY_SPAN // BLOCK
    assert [piece.keys for piece in job.pieces] == [slice(0, 1024), slice(0, 1024)]
    (late,) = plan([(1320, 20)], shape(window=300)).jobs
    assert late.blocks[0] == 10 + KEY_SPAN // BLOCK
    assert [piece.keys.start for piece in late.pieces] == [0, KEY_SPAN]


@pytest.mark.parametrize("window", [None, 1, 7, 600])
def test_masks_hide_the_future_and_what_left_the_window(window: int | None) -> None:
    masks = Masks(shape(window=window), "cpu")
    for firsts, rows, keys in [([3, 0, 25], 8, 32), ([700], 32, 1024), ([5, 5], 1, 64), ([0], 8, 32)]:
        mask = masks.rows(firsts, rows, keys)
        assert mask.shape == (1 if len(set(firsts)) == 1 else len(firsts), 1, rows, keys)
        for found, first in zip(mask.expand(len(firsts), -1, -1, -1), firsts, strict=True):
            query = first + (torch.arange(rows) // 2)[:, None]
            key = torch.arange(keys)
            seen = key <= query if window is None else (key <= query) & (key > query - window)
            assert torch.equal(found[0] == 0, seen)
            assert torch.equal(found[0] == -torch.inf, ~seen)


@settings(max_examples=60, deadline=None)
@given(
    slices=st.lists(st.tuples(st.integers(0, 900), st.integers(1, 70)), min_size=1, max_size=9),
    window=st.sampled_from([None, 40]),
)
def test_every_token_is_answered_once_with_all_keys_that_it_sees(
    slices: list[tuple[int, int]], window: int | None
) -> None:
    step = plan(slices, shape(window=window))
    tokens = listed(step.gathered_P) or list(range(step.num_rows))
    restored = listed(step.restored_T) or tokens
    total = sum(count for _, count in slices)
    assert [tokens[row] for row in restored] == list(range(total))
    positions = [position for start, count in slices for position in range(start, start + count)]
    slots = step.slots_T.tolist()
    for job in step.jobs:
        rows, per_sequence = range(*job.rows.indices(step.num_rows)), len(job.blocks) // job.num_sequences
        for row in set(restored) & set(rows):
            member, at = divmod(row - rows.start, job.num_tokens)
            (piece,) = (piece for piece in job.pieces if piece.tokens.start <= at < piece.tokens.stop)
            mask_K = piece.mask.expand(job.num_sequences, -1, -1, -1)[member, 0]
            seen_K = mask_K[0 if len(mask_K) == 1 else 2 * (at - piece.tokens.start)] == 0
            blocks = job.blocks[member * per_sequence : (member + 1) * per_sequence]
            read = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).view(-1)[piece.keys][seen_K].tolist()
            last = positions[tokens[row]]
            assert len(read) == len(set(read)) == min(last + 1, window or last + 1)
            assert read[-1] == slots[tokens[row]]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("firsts", [[0], [5, 5], [0, 77, 300]])
def test_masks_made_anew_are_those_of_the_table(window: int | None, firsts: list[int]) -> None:
    masks = Masks(shape(window=window), "cpu")
    for rows, keys in ((1, 32), (8, 512), (32, 64)):
        made = masks.made(firsts, rows, keys)
        assert made.is_contiguous()
        assert made.shape == (len(firsts), 1, rows, keys)
        assert torch.equal(made, masks.rows(firsts, rows, keys).expand(made.shape))
