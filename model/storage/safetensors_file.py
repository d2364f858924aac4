"""Tensors of one safetensors file, read by exact byte ranges. What its header says is `safetensors_header`'s."""

import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.storage.safetensors_header import SLICE_BYTES, RunningChecksum, fill, opened


def read_into(path: Path, start: int, target: Tensor, check: RunningChecksum | None = None) -> None:
    """Fill a contiguous CPU tensor with bytes from `start` on. Raises CheckpointError if they end early."""
    with opened(path) as fd:
        _fill(path, fd, start, target, check)


def read_slices(
    path: Path, start: int, numel: int, dtype: torch.dtype, unit: int = 1, check: RunningChecksum | None = None
) -> Iterator[Tensor]:
    """Read `numel` elements from byte `start` on as flat CPU slices of at most 8 MiB, in whole units.

    Every slice lies in the same memory: use it before asking for the next. `numel` must be a multiple of
    `unit`. `check` is given all bytes as they come.
    """
    if numel % unit:
        raise ValueError(f"{numel} elements cannot be cut into units of {unit}")
    if not numel:
        return
    step = max(1, SLICE_BYTES // dtype.itemsize // unit) * unit
    staging = _pages(min(step, numel), dtype)
    with opened(path) as fd:
        for first in range(0, numel, step):
            part = staging[: min(step, numel - first)]
            _fill(path, fd, start + first * dtype.itemsize, part, check)
            yield part


def _pages(numel: int, dtype: torch.dtype) -> Tensor:
    """Memory of its own pages, given back whole; from the heap it would leave holes between kept tensors."""
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize), dtype=dtype)


def _fill(path: Path, fd: int, start: int, target: Tensor, check: RunningChecksum | None) -> None:
    fill(path, fd, start, target.view(-1).view(torch.uint8).numpy(), check)
