"""Regions are sealed, really shared and never leak; places in them never overlap."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors import shared_rows
from actors.shared_rows import RegionError, RowSpace, RowsPool, SharedRows
from tests.support.memory_map import num_descriptors, num_regions

ROOT = Path(__file__).resolve().parent.parent.parent


def memfd(size: int, seals: int | None = fcntl.F_SEAL_SHRINK) -> int:
    fd = os.memfd_create("octavo-rows", os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if seals is not None else 0))
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError as error:
        return error.errno == errno.EBADF
    return False


# ---- regions ----------------------------------------------------------------------------------------------


def test_a_region_keeps_its_size_for_ever() -> None:
    region = SharedRows.create(3, 4)
    assert (region.tensor.shape, region.tensor.dtype) == ((3, 4), torch.float32)
    assert not region.tensor.any()
    for size in (0, 47, 49, 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert not os.get_inheritable(region.fd)
    region.close()


def test_both_ends_see_the_same_rows() -> None:
    mine = SharedRows.create(3, 4)
    fd = os.dup(mine.fd)
    theirs = SharedRows.adopt(fd, 3, 4)
    assert closed(fd)
    mine.tensor[1] = 5
    assert theirs.tensor.tolist() == [[0] * 4, [5] * 4, [0] * 4]
    theirs.tensor[2, 3] = 7
    assert mine.tensor[2, 3] == 7
    mine.close()
    theirs.close()


def test_another_process_sees_them_too() -> None:
    region = SharedRows.create(3, 4)
    region.tensor.copy_(torch.arange(12.0).view(3, 4))
    command = (sys.executable, "-m", "tests.support.shared_rows_writer", str(region.fd), "3", "4")
    subprocess.run(command, cwd=ROOT, pass_fds=(region.fd,), check=True, timeout=120)
    assert torch.equal(region.tensor, torch.arange(12.0).view(3, 4) * 2)
    region.close()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: memfd(48, seals=0), "could shrink"),
        (lambda: memfd(48, seals=None), "could shrink"),
        (lambda: memfd(48, seals=fcntl.F_SEAL_GROW), "could shrink"),
        (lambda: memfd(44), "44 bytes, said to have 48"),
        (lambda: memfd(52), "52 bytes, said to have 48"),
        (lambda: memfd(48, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE), "no region"),
        (lambda: os.open(__file__, os.O_RDONLY), "no region"),
        (lambda: os.open(os.devnull, os.O_RDWR), "no region"),
    ],
    ids=["no seals", "cannot be sealed", "may shrink", "too small", "too large", "read-only", "a file", "a device"],
)
def test_what_is_not_a_region_is_refused_and_closed(make: Callable[[], int], said: str) -> None:
    before = num_descriptors()
    fd = make()
    with pytest.raises(RegionError, match=said):
        SharedRows.adopt(fd, 3, 4)
    assert closed(fd)
    assert num_descriptors() == before


def test_a_size_that_no_machine_has_is_refused_and_nothing_stays_open() -> None:
    before = num_descriptors()
    for num_rows in (2**58, 2**64 - 1, 0):
        with pytest.raises(RegionError):
            SharedRows.create(num_rows, 4)
    assert num_descriptors() == before
    huge = memfd(2**62)  # sparse: as large as its sender says, and no room for it in any address space
    with pytest.raises(RegionError, match="no region"):
        SharedRows.adopt(huge, 2**58, 4)
    assert num_descriptors() == before


def test_nothing_of_a_region_stays() -> None:
    descriptors, regions = num_descriptors(), num_regions()
    for _ in range(20):
        mine = SharedRows.create(100, 4)
        theirs = SharedRows.adopt(os.dup(mine.fd), 100, 4)
        mine.unshare()
        mine.unshare()
    assert num_regions() > regions
    rows = mine.tensor[3:5]
    mine.close()
    mine.close()
    theirs.close()
    assert (num_descriptors(), num_regions()) == (descriptors + 1, regions + 1)
    rows += 1  # a tensor keeps the memory
    del rows
    assert (num_descriptors(), num_regions()) == (descriptors, regions)


def test_a_slice_is_found_and_nothing_else_is() -> None:
    region = SharedRows.create(10, 4)
    assert region.place(region.tensor) == 0
    assert region.place(region.tensor[7:]) == 7
    assert region.place(torch.zeros(2, 4)) is None
    assert region.place(region.tensor[:, 1:]) is None
    assert region.place(region.tensor[::2]) is None
    assert region.place(region.tensor[2, 1:3]) is None
    assert region.place(region.tensor[3:3]) is None
    region.close()


def test_this_system_has_them() -> None:
    assert shared_rows.supported()


# ---- places -----------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.lists(st.integers(-8, 12).filter(bool), max_size=60))
def test_places_never_overlap_and_are_the_first_that_are_free(num_rows: int, steps: list[int]) -> None:
    """A positive step takes so many rows, a negative one frees one of those that are taken."""
    space = RowSpace(num_rows)
    owner = [0] * num_rows  # by row, who has it
    taken: dict[int, int] = {}
    for number, step in enumerate(steps, start=1):
        if step > 0:
            free = [at for at in range(num_rows - step + 1) if not any(owner[at : at + step])]
            assert space.take(step) == (free[0] if free else None)
            if free:
                owner[free[0] : free[0] + step] = [number] * step
                taken[free[0]] = step
        elif taken:
            first = sorted(taken)[-step % len(taken)]
            space.free(first)
            count = taken.pop(first)
            owner[first : first + count] = [0] * count
        assert space.num_taken == len(taken)


def test_what_was_not_taken_cannot_be_given_back() -> None:
    space = RowSpace(4)
    with pytest.raises(ValueError, match="row 0 was not taken"):
        space.free(0)
    assert space.take(2) == 0
    with pytest.raises(ValueError, match="row 1 was not taken"):
        space.free(1)
    space.free(0)
    with pytest.raises(AssertionError, match="a place of 0 rows"):
        space.take(0)


def test_a_pool_gives_rows_until_it_is_full_and_takes_them_back() -> None:
    pool = RowsPool(SharedRows.create(5, 2))
    first, second = pool.take(2), pool.take(3)
    assert first is not None
    assert second is not None
    assert pool.take(1) is None
    second.fill_(1)
    assert not first.any()
    pool.free(first)
    assert pool.take(3) is None
    again = pool.take(2)
    assert again is not None
    assert again.data_ptr() == first.data_ptr()
    with pytest.raises(AssertionError, match="not of this region"):
        pool.free(torch.zeros(2, 2))
    assert pool.take(0) is None  # no rows need no place, and could not be found again
    pool.region.close()
