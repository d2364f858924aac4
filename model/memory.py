"""Giving freed memory back to the operating system while weights are loaded.

Who allocates what, and when, is left to the loaders.
"""

import ctypes


def release_freed_memory() -> None:
    """Return the C library's free pages to the system; does nothing where it has no way to.

    Loading frees an fp32 tensor for every one it packs. glibc's malloc keeps such holes resident and does not
    always reuse them (an aligned request wants a little more than the hole it left), so that a process would
    seem to need half as much memory again as its weights.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
