"""Which KV blocks are free. It hands out numbers; the tensors behind them belong to the model room."""

from collections.abc import Iterable


class BlockError(AssertionError):
    """A block is owned twice, freed twice, lost, or unknown: a bug, never a user's mistake."""


class BlockAllocator:
    """`num_blocks` KV blocks of equal size, numbered from 0.

    The block freed last is handed out first: it is the likeliest to be in a cache. A block's contents are
    whatever its last owner left.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}, but must be at least 1")
        self._num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = [True] * num_blocks

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self._num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, all or none. Raises BlockError when fewer are free: ask `num_free` first."""
        if not 0 <= count <= len(self._free):
            raise BlockError(f"{count} blocks wanted, {len(self._free)} of {self._num_blocks} are free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._is_free[block] = False
        return taken

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back. Raises BlockError on a block that is unknown or already free."""
        for block in blocks:
            if not 0 <= block < self._num_blocks:
                raise BlockError(f"block {block} does not exist; there are {self._num_blocks}")
            if self._is_free[block]:
                raise BlockError(f"block {block} is freed twice")
            self._is_free[block] = True
            self._free.append(block)

    def check_integrity(self, held: Iterable[Iterable[int]]) -> None:
        """Audit: every block is free, or in exactly one of the `held` tables. Raises BlockError naming the block."""
        owners = [0] * self._num_blocks
        for block in self._free:
            owners[block] += 1
        for table in held:
            for block in table:
                if not 0 <= block < self._num_blocks:
                    raise BlockError(f"block {block} is held, but there are only {self._num_blocks}")
                if self._is_free[block]:
                    raise BlockError(f"block {block} is held and free at once")
                owners[block] += 1
        for block, count in enumerate(owners):
            if count != 1:
                raise BlockError(f"block {block} has {count} owners, but must have exactly 1")


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` positions."""
    return -(-num_tokens // block_size)
