"""Finds bytes in the memory of a process, its own or a child's, and flips bits there: as a cosmic ray would.

Linux only. Weights are found by how a few of them lie side by side in their kernel's layout.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

_CHUNK = 16 << 20


def find(pattern: bytes, pid: int | None = None) -> list[int]:
    """Addresses of `pattern` in writable memory that is no file's."""
    window = mmap.mmap(-1, _CHUNK)
    own = np.frombuffer(window, dtype=np.uint8).ctypes.data
    found: list[int] = []
    with _Memory(pid, os.O_RDONLY) as fd:
        for start, stop in _regions(pid):
            if pid is None and start <= own < stop:
                continue
            for at in range(start, stop, _CHUNK - len(pattern)):
                count = _read(fd, window, at, min(_CHUNK, stop - at))
                where = window.find(pattern, 0, count)
                while where >= 0:
                    found.append(at + where)
                    where = window.find(pattern, where + 1, count)
    return sorted(set(found))


def inverted(pattern: bytes) -> bytes:
    """What to keep of a pattern that is looked for in one's own memory: not another copy of it."""
    return bytes(byte ^ 0xFF for byte in pattern)


def flip(address: int, bit: int, pid: int | None = None, unless_not: bytes | None = None) -> None:
    """Flips bit `bit` of the memory from `address` on.

    Not where something else is by now than what `unless_not` is the inverse of: memory that was free when it was found
    may be somebody's, and a bit flipped there is a crash.
    """
    with _Memory(pid, os.O_RDWR) as fd:
        if unless_not is not None and inverted(os.pread(fd, len(unless_not), address)) != unless_not:
            return
        byte = os.pread(fd, 1, address + bit // 8)[0]
        os.pwrite(fd, bytes([byte ^ 1 << bit % 8]), address + bit // 8)


def first_bytes(kernel: str, weight_OI: torch.Tensor) -> bytes:
    """How the packed form of a weight begins: of its first eight outputs, the first inputs, as they are held.

    Made without a tensor of its own: a freed one would leave the same bytes in memory that somebody else gets, and a
    bit flipped there is a crash.
    """
    if kernel in ("fp32", "fp16"):
        return struct.pack("<8f" if kernel == "fp32" else "<8e", *weight_OI[:8, 0].tolist())
    together, view, form = {"bf16": (2, torch.int16, "<16h"), "int8": (4, torch.int8, "<32b")}[kernel]
    return struct.pack(form, *(one for row in weight_OI[:8, :together].view(view).tolist() for one in row))


class _Memory:
    def __init__(self, pid: int | None, flags: int) -> None:
        self._fd = os.open(f"/proc/{'self' if pid is None else pid}/mem", flags)

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _regions(pid: int | None) -> Iterator[tuple[int, int]]:
    for line in Path(f"/proc/{'self' if pid is None else pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if fields[1].startswith("rw") and fields[4] == "0" and fields[-1] not in ("[vvar]", "[vsyscall]"):
            start, stop = (int(part, 16) for part in fields[0].split("-"))
            yield start, stop


def _read(fd: int, window: mmap.mmap, at: int, count: int) -> int:
    try:
        return os.preadv(fd, [memoryview(window)[:count]], at)
    except OSError:  # unmapped since, or a guard page
        return 0
