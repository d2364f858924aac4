"""Blocks: handed out once, taken back once, none lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.block_allocator import BlockAllocator, BlockError, blocks_for


def test_blocks_are_handed_out_and_taken_back() -> None:
    allocator = BlockAllocator(4)
    first, second = allocator.allocate(2), allocator.allocate(1)
    assert len({*first, *second}) == 3
    assert (allocator.num_blocks, allocator.num_free) == (4, 1)
    allocator.check_integrity([first, second])
    allocator.free(first)
    assert allocator.num_free == 3
    allocator.check_integrity([second])


def test_the_block_freed_last_is_handed_out_first() -> None:
    allocator = BlockAllocator(8)
    table = allocator.allocate(3)
    allocator.free([table[1]])
    assert allocator.allocate(1) == [table[1]]


def test_too_many_blocks_are_refused_whole() -> None:
    allocator = BlockAllocator(2)
    with pytest.raises(BlockError, match="3 blocks wanted, 2 of 2 are free"):
        allocator.allocate(3)
    assert allocator.num_free == 2
    assert allocator.allocate(0) == []


def test_double_and_foreign_frees_are_noticed() -> None:
    allocator = BlockAllocator(2)
    (block,) = allocator.allocate(1)
    allocator.free([block])
    with pytest.raises(BlockError, match=f"block {block} is freed twice"):
        allocator.free([block])
    with pytest.raises(BlockError, match="block 2 does not exist"):
        allocator.free([2])
    with pytest.raises(BlockError, match="block -1 does not exist"):
        allocator.free([-1])


def test_the_audit_names_the_block() -> None:
    allocator = BlockAllocator(3)
    table = allocator.allocate(2)
    with pytest.raises(BlockError, match=f"block {table[1]} has 0 owners"):
        allocator.check_integrity([table[:1]])
    with pytest.raises(BlockError, match=f"block {table[0]} has 2 owners"):
        allocator.check_integrity([table, table[:1]])
    with pytest.raises(BlockError, match="block 2 is held and free at once"):
        allocator.check_integrity([table, [2]])
    with pytest.raises(BlockError, match="block 7 is held, but there are only 3"):
        allocator.check_integrity([table, [7]])


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks is 0"):
        BlockAllocator(0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3))))
def test_any_history_keeps_every_block_exactly_once(history: list[tuple[int, int]]) -> None:
    allocator = BlockAllocator(9)
    tables: list[list[int]] = []
    for count, choice in history:
        if count and count <= allocator.num_free:
            tables.append(allocator.allocate(count))
        elif tables:
            allocator.free(tables.pop(choice % len(tables)))
        allocator.check_integrity(tables)
        assert allocator.num_free == 9 - sum(map(len, tables))


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (32, 1), (33, 2), (64, 2)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, 32) == blocks
