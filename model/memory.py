"""Memory as the operating system sees it: giving freed pages back while weights are loaded, huge pages afterwards.

Who allocates what, and when, is left to the loaders.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_HUGE_BYTES = 2 << 20


def release_freed_memory() -> None:
    """Return the C library's free pages to the system; does nothing where it has no way to.

    Loading frees an fp32 tensor for every one it packs. glibc's malloc keeps such holes resident and does not
    always reuse them (an aligned request wants a little more than the hole it left), so that a process would
    seem to need half as much memory again as its weights.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def collapse_into_huge_pages() -> int:
    """Turns this process's anonymous memory into huge pages, as far as it fills them; returns the bytes turned.

    Weights are read from end to end for every batch, and with small pages every other cache line costs a walk of the
    page tables. A hint to malloc alone does not do: packed weights are often a little smaller than a huge page, and
    only neighbours together fill one. Where the system has no such call (Linux before 6.1) or refuses, memory is only
    marked, and the kernel may do it later.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None or not _MAPS.exists():
        return 0
    turned = 0
    for line in _MAPS.read_text().splitlines():
        span, rights, _, _, inode, *name = line.split()
        if inode != "0" or not rights.startswith("rw") or not rights.endswith("p") or name not in ([], ["[heap]"]):
            continue
        low, high = (int(end, 16) for end in span.split("-"))
        start = -(-low // _HUGE_BYTES) * _HUGE_BYTES
        length = high // _HUGE_BYTES * _HUGE_BYTES - start
        if length > 0:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
            turned += _collapse(madvise, start, length)
    return turned


def _collapse(madvise: Callable[..., int], start: int, length: int) -> int:
    """Page by page: one that was never touched, or is not wholly there, is left as it is."""
    pages = range(start, start + length, _HUGE_BYTES)
    return _HUGE_BYTES * sum(
        madvise(ctypes.c_void_p(at), ctypes.c_size_t(_HUGE_BYTES), _MADV_COLLAPSE) == 0 for at in pages
    )
