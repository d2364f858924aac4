"""Which KV blocks are held, by how many, and what those that nobody holds still remember.

It hands out numbers; the tensors behind them belong to the model room. A block that was published under a key may be
found by it and shared, and is remembered when its last holder lets go, until the room is needed: then those are
forgotten first that were let go first. Who may read which block, and when one is whole, is the scheduler's decision;
keys are `cluster.prefix_hash`'s.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from cluster.prefix_hash import BlockKey


class BlockError(AssertionError):
    """A block is lent, freed or lost against the books, or unknown: a bug, never a user's mistake."""


class BlockAllocator:
    """`num_blocks` KV blocks of equal size, numbered from 0.

    Blocks that remember nothing are handed out before those that do, the one freed last first: it is the likeliest to
    be in a cache. A block's contents are whatever its last owner left.

    `era` counts how often everything was forgotten: whoever got blocks in an earlier one must publish none.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}, but must be at least 1")
        self.era = 0
        self._num_blocks = num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * num_blocks
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._by_key: dict[BlockKey, int] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self._num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, whether they remember something or not."""
        return len(self._blank) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their key, held or not."""
        return len(self._by_key)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, all or none. Raises BlockError when fewer are free: ask `num_free` first."""
        if not 0 <= count <= self.num_free:
            raise BlockError(f"{count} blocks wanted, {self.num_free} of {self._num_blocks} are free")
        while len(self._blank) < count:
            self._forget(next(iter(self._idle)))
        taken = [self._blank.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def free(self, blocks: Iterable[int]) -> None:
        """Let go of blocks, one holder each; a sequence's last block first, so that it is forgotten first.

        Raises BlockError on a block that is unknown or free.
        """
        for block in blocks:
            if not 0 <= block < self._num_blocks:
                raise BlockError(f"block {block} does not exist; there are {self._num_blocks}")
            if self._holders[block] == 0:
                raise BlockError(f"block {block} is freed twice")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._keys[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None

    def find(self, key: BlockKey) -> int | None:
        """The block published under `key`, if it is remembered."""
        return self._by_key.get(key)

    def key(self, block: int) -> BlockKey | None:
        """Under what a block can be found, if it can."""
        return self._keys[block]

    def holders(self, block: int) -> int:
        """How many hold it."""
        return self._holders[block]

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these, which can be found, nobody holds: to share them takes room from others."""
        return sum(self._holders[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that were found. Raises BlockError on one that cannot be found."""
        for block in blocks:
            if self._keys[block] is None:
                raise BlockError(f"block {block} is shared, but was not published")
            if self._holders[block] == 0:
                del self._idle[block]
            self._holders[block] += 1

    def publish(self, block: int, key: BlockKey) -> int:
        """Let a whole block be found by `key`; returns the block to hold from now on.

        Where another one has that key already, its contents are the same: it is shared, and `block` is let go. Raises
        BlockError on a block that nobody holds, or that has another key.
        """
        if self._holders[block] == 0 or self._keys[block] not in (None, key):
            raise BlockError(f"block {block} is published, but has {self._holders[block]} holders and perhaps a key")
        other = self._by_key.setdefault(key, block)
        if other != block:
            self.share([other])
            self.free([block])
        else:
            self._keys[block] = key
        return other

    def forget(self, blocks: Iterable[int]) -> None:
        """Let these be found no more; whoever holds them keeps them."""
        for block in blocks:
            self._forget(block)

    def forget_all(self) -> None:
        """Let nothing be found any more, and nothing be published by who holds blocks now."""
        self.era += 1
        self.forget(list(self._by_key.values()))

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is None:
            return
        self._keys[block] = None
        del self._by_key[key]
        if self._holders[block] == 0:
            del self._idle[block]
            self._blank.append(block)

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Audit: every block is in as many of the `held` tables as it has holders, once in each, or free.

        What can be found is found under its own key. Raises BlockError naming the block.
        """
        owners = [0] * self._num_blocks
        for table in held:
            for block in table:
                if not 0 <= block < self._num_blocks:
                    raise BlockError(f"block {block} is held, but there are only {self._num_blocks}")
                if self._holders[block] == 0:
                    raise BlockError(f"block {block} is held and free at once")
                owners[block] += 1
            if len(set(table)) < len(table):
                raise BlockError(f"a table holds a block twice: {table}")
        for block, (count, holders) in enumerate(zip(owners, self._holders, strict=True)):
            if count != holders:
                raise BlockError(f"block {block} has {count} owners, but must have exactly {holders}")
        self._check_free(owners)
        keyed = {key: block for block, key in enumerate(self._keys) if key is not None}
        if keyed != self._by_key:
            wrong = sorted(set(keyed.values()) ^ set(self._by_key.values()))
            raise BlockError(f"blocks {wrong} are not found under their keys")

    def _check_free(self, owners: list[int]) -> None:
        unheld = [block for block, count in enumerate(owners) if not count]
        if sorted([*self._blank, *self._idle]) != unheld:
            raise BlockError(f"blocks {unheld} have no owner, but {self._blank} and {list(self._idle)} are free")
        for block in unheld:
            if (self._keys[block] is None) != (block not in self._idle):
                raise BlockError(f"block {block} is remembered without a key, or not remembered with one")


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` positions."""
    return -(-num_tokens // block_size)
