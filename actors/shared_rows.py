"""Shared memory that has no name: rows of floats that two processes on one machine see.

A region is a sealed memfd: the kernel frees it with the last descriptor and mapping, however a process ends, so that
nothing can leak. Its size cannot change, so that no peer can make the other fault. Pages are given only as they are
touched: a region may be larger than it will ever be full. What the rows mean is `protos.lane`'s, who sends the
descriptor to whom the two ends' of the lane.
"""

import fcntl
import mmap
import os
from bisect import insort

import torch

from protos.checksum import array_checksum
from protos.lane import as_rows, region_bytes


class RegionError(OSError):
    """A region that cannot be made, or a descriptor that is not what its sender says."""


def supported() -> bool:
    """Whether this system has anonymous, sealable shared memory."""
    return hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")


class SharedRows:
    """(num_rows, width) fp32. `create` makes a region, `adopt` maps one whose descriptor a peer sent.

    `fd` is there to be sent, -1 where it is not needed: the mapping has a descriptor of its own.
    """

    def __init__(self, fd: int, num_rows: int, width: int) -> None:
        self.num_rows = num_rows
        self.width = width
        self.tensor = as_rows(memoryview(mmap.mmap(fd, region_bytes(num_rows, width))), width)
        self._array = self.tensor.numpy()
        self._address = self.tensor.data_ptr()
        self._row_bytes = region_bytes(1, width)
        self._num_bytes = region_bytes(num_rows, width)
        self.fd = fd

    @classmethod
    def create(cls, num_rows: int, width: int) -> "SharedRows":
        """Raises RegionError where the system refuses."""
        fd = -1
        try:
            fd = os.memfd_create("octavo-rows", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, region_bytes(num_rows, width))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, num_rows, width)
        except (OSError, AttributeError, ValueError, OverflowError) as error:
            if fd >= 0:
                os.close(fd)
            raise RegionError(f"no shared memory for {num_rows} rows of {width}: {error}") from None

    @classmethod
    def adopt(cls, fd: int, num_rows: int, width: int) -> "SharedRows":
        """Maps `fd` and closes it in any case. Raises RegionError unless it is sealed and as large as claimed."""
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            size, claimed = os.fstat(fd).st_size, region_bytes(num_rows, width)
            if seals & fcntl.F_SEAL_SHRINK == 0:
                raise RegionError("a region that could shrink")
            if size != claimed:
                raise RegionError(f"a region of {size} bytes, said to have {claimed}")
            region = cls(fd, num_rows, width)
            region.fd = -1
            return region
        except (OSError, AttributeError, ValueError, OverflowError) as error:
            raise error if isinstance(error, RegionError) else RegionError(f"no region: {error}") from None
        finally:
            os.close(fd)

    def place(self, rows_MD: torch.Tensor) -> int | None:
        """The row at which `rows_MD`, a slice of this region's tensor, begins; None for any other tensor."""
        offset = rows_MD.data_ptr() - self._address
        if not 0 <= offset < self._num_bytes or not rows_MD.is_contiguous():
            return None
        row, rest = divmod(offset, self._row_bytes)
        return None if rest else row

    def slice(self, first: int, count: int) -> torch.Tensor:
        """(count, width) of this memory."""
        return self.tensor[first : first + count]

    def put(self, base: int, at: int, rows_MD: torch.Tensor) -> None:
        """Copies (M, width) of fp32 on the CPU to row `base` + `at` and on; numpy's copy is the shorter way."""
        first = base + at
        self._array[first : first + len(rows_MD)] = rows_MD.numpy()

    def checksum(self, *places: tuple[int, int]) -> int:
        """CRC-32C of the rows in these places, (first row, how many), one behind another."""
        found = 0
        for first, count in places:
            found = array_checksum(self._array[first : first + count], found)
        return found

    def close(self) -> None:
        """Gives everything back, the memory when the last slice of it has gone, too."""
        self.unshare()
        self.tensor = torch.empty(0, self.width)
        self._array = self.tensor.numpy()
        self._num_bytes = 0

    def unshare(self) -> None:
        """Gives the descriptor back: who has not been sent it yet never will be. The memory stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class RowSpace:
    """Gives out adjacent rows of a region, always the first that are free: so they stay in the processor's caches.

    >>> space = RowSpace(10)
    >>> space.take(4), space.take(3), space.take(4)
    (0, 4, None)
    >>> space.free(0); space.take(2)
    0
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._taken: list[tuple[int, int]] = []

    def take(self, count: int) -> int | None:
        """The first of `count` free rows, at least one; None when there is no such place."""
        assert count > 0, f"a place of {count} rows"
        at = 0
        for start, stop in self._taken:
            if start - at >= count:
                break
            at = stop
        if at + count > self.num_rows:
            return None
        insort(self._taken, (at, at + count))
        return at

    def free(self, first: int) -> None:
        """Gives back what `take` returned."""
        for index, (start, _) in enumerate(self._taken):
            if start == first:
                del self._taken[index]
                return
        raise ValueError(f"row {first} was not taken")

    @property
    def num_taken(self) -> int:
        """Places in use."""
        return len(self._taken)


class RowsPool:
    """A coordinator's routed rows, in memory that the replicas of this machine can read."""

    def __init__(self, region: SharedRows) -> None:
        self.region = region
        self._space = RowSpace(region.num_rows)

    def take(self, count: int) -> torch.Tensor | None:
        """(count, width) to be filled; None where there is no room. Give it back with `free`."""
        first = self._space.take(count) if count > 0 else None  # no rows are at no place
        return None if first is None else self.region.tensor[first : first + count]

    def free(self, rows_ND: torch.Tensor) -> None:
        """Takes back what `take` gave."""
        first = self.region.place(rows_ND)
        assert first is not None, "these rows are not of this region"
        self._space.free(first)
