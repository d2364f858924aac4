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


def test_what_was_published_is_found_and_shared_until_the_room_is_needed() -> None:
    allocator = BlockAllocator(4)
    first, second = table = allocator.allocate(2)
    assert allocator.publish(first, b"one") == first
    assert allocator.publish(second, b"two") == second
    allocator.share([first])
    allocator.check_integrity([table, [first]])
    assert (allocator.holders(first), allocator.num_free, allocator.num_idle(table)) == (2, 2, 0)
    allocator.free(reversed(table))
    assert (allocator.num_free, allocator.num_cached, allocator.num_idle(table)) == (3, 2, 1)
    assert [allocator.find(key) for key in (b"one", b"two", b"three")] == [first, second, None]
    allocator.check_integrity([[first]])
    taken = allocator.allocate(3)
    assert second in taken, "the last that there was"
    assert allocator.find(b"two") is None
    assert allocator.find(b"one") == first, "somebody holds it"
    allocator.check_integrity([[first], taken])


def test_blocks_that_remember_nothing_go_first_then_those_let_go_first() -> None:
    allocator = BlockAllocator(5)
    a, b, c, d = allocator.allocate(4)
    for block in (a, b, c):
        allocator.publish(block, bytes([block]))
    allocator.free([b, d, a, c])
    allocator.share([b])
    allocator.free([b])  # was used again
    assert allocator.allocate(1) == [d], "the blank one freed last"
    allocator.allocate(2)  # one that nobody has ever had, and the one that was let go first
    assert [allocator.find(bytes([block])) for block in (a, b, c)] == [None, b, c]


def test_a_key_has_one_block_and_who_made_another_shares_it() -> None:
    allocator = BlockAllocator(3)
    (mine,), (yours,) = allocator.allocate(1), allocator.allocate(1)
    allocator.publish(mine, b"key")
    assert allocator.publish(yours, b"key") == mine
    assert (allocator.holders(mine), allocator.holders(yours), allocator.num_free) == (2, 0, 2)
    assert allocator.publish(mine, b"key") == mine
    allocator.check_integrity([[mine], [mine]])
    with pytest.raises(BlockError, match=f"block {mine} is published"):
        allocator.publish(mine, b"another")
    with pytest.raises(BlockError, match=f"block {yours} is published"):
        allocator.publish(yours, b"another")
    with pytest.raises(BlockError, match=f"block {yours} is shared, but was not published"):
        allocator.share([yours])


def test_what_is_forgotten_is_found_no_more_and_held_all_the_same() -> None:
    allocator = BlockAllocator(3)
    held, let_go = allocator.allocate(2)
    allocator.publish(held, b"held")
    allocator.publish(let_go, b"let go")
    allocator.free([let_go])
    era = allocator.era
    allocator.forget_all()
    assert (allocator.era, allocator.num_cached, allocator.num_free) == (era + 1, 0, 2)
    assert allocator.find(b"held") is None
    allocator.check_integrity([[held]])
    allocator.forget([held, let_go])  # again: nothing happens
    allocator.free([held])
    allocator.check_integrity([])
    assert sorted(allocator.allocate(3)) == [0, 1, 2]


def test_the_audit_knows_who_shares_what() -> None:
    allocator = BlockAllocator(3)
    (block,) = allocator.allocate(1)
    allocator.publish(block, b"key")
    allocator.share([block])
    with pytest.raises(BlockError, match=f"block {block} has 1 owners, but must have exactly 2"):
        allocator.check_integrity([[block]])
    with pytest.raises(BlockError, match="a table holds a block twice"):
        allocator.check_integrity([[block, block]])


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
