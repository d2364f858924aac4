"""The header of a safetensors file, checked against the file, and checksums of exact byte ranges of it.

Format: https://huggingface.co/docs/safetensors (8 bytes of little-endian header length, a JSON header, the
tensors back to back). Every claim of the header is checked before anything is allocated for it. Nothing here makes a
tensor, which is `model.storage.safetensors_file`'s work: who only asks what there is, and whose, needs no torch. Which
files make a checkpoint is `model.storage.weight_files`' work, which tensors a model needs `model.storage.ledger`'s.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.checksum import checksum
from model.storage.stored_dtype import StoredDtype
from model.storage.strict_json import JSONError, parse_object

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
SLICE_BYTES = 8 << 20
_CHECKED_BYTES = 256 << 10  # what has just been read is still in the core's own cache
_MAX_RANK = 8
_MAX_COUNT = 2**48


class CheckpointError(ValueError):
    """Weights that cannot be trusted or read; the message names the file, and the tensor if there is one."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in its file: `nbytes` bytes from byte `start` of the file on."""

    name: str
    path: Path
    dtype: StoredDtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What a safetensors file says it holds; `raw` is the JSON as stored."""

    path: Path
    raw: bytes
    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> SafetensorsHeader:
    """Parse and check the header of one file, reading nothing beyond it.

    Raises CheckpointError for a header that is malformed, names a tensor twice, or does not account for every
    byte of the file exactly once.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with opened(path) as fd:
        file_bytes = os.fstat(fd).st_size
        raw = _raw_header(path, fd, file_bytes)
    try:
        entries = parse_object(raw)
    except JSONError as error:
        raise CheckpointError(f"{path}: header: {error}") from None
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    data_start = 8 + len(raw)
    tensors = {name: _entry(path, name, entry, data_start, file_bytes) for name, entry in entries.items()}
    _check_layout(path, tensors.values(), data_start, file_bytes)
    return SafetensorsHeader(path, raw, metadata, tensors)


class RunningChecksum:
    """CRC-32C of the bytes that reads brought in so far, taken in memory, of what will be used.

    `on_bytes(count)` is called as they come, and may take its time: what is read next waits for it.
    """

    def __init__(self, on_bytes: Callable[[int], None] | None = None) -> None:
        self.value = 0
        self._on_bytes = on_bytes

    def add(self, data: npt.NDArray[np.uint8]) -> None:
        self.value = checksum(data, self.value)
        if self._on_bytes is not None:
            self._on_bytes(len(data))


def range_checksum(path: Path, start: int, nbytes: int, on_bytes: Callable[[int], None]) -> int:
    """CRC-32C of bytes of a file, which are kept nowhere. `on_bytes(count)` is called as they come."""
    check = RunningChecksum()
    staging = np.empty(min(_CHECKED_BYTES, nbytes), dtype=np.uint8)
    with opened(path) as fd:
        for first in range(0, nbytes, _CHECKED_BYTES):
            part = staging[: nbytes - first]
            fill(path, fd, start + first, part, check)
            on_bytes(len(part))
    return check.value


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file descriptor of the file; the operating system's errors in the block become CheckpointError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def fill(path: Path, fd: int, start: int, target: npt.NDArray[np.uint8], check: RunningChecksum | None = None) -> None:
    """Fills `target` with bytes from `start` on. Raises CheckpointError if they end early.

    They are read with `preadv` into memory that already has its place, never mapped: pages of a mapped file would count
    as the reader's memory.
    """
    step = SLICE_BYTES if check is None else _CHECKED_BYTES
    done = 0
    while done < len(target):
        count = os.preadv(fd, [target[done : done + step].data], start + done)
        if count == 0:
            raise CheckpointError(f"{path}: ends at byte {start + done}, it was truncated after it was opened")
        if check is not None:
            check.add(target[done : done + count])
        done += count


def _raw_header(path: Path, fd: int, file_bytes: int) -> bytes:
    length_bytes = os.pread(fd, 8, 0)
    if len(length_bytes) < 8:
        raise CheckpointError(f"{path}: {file_bytes} bytes are too few for a safetensors file")
    length = int.from_bytes(length_bytes, "little")
    if length > MAX_HEADER_BYTES:
        limit = f"over the limit of {MAX_HEADER_BYTES}; not a safetensors file?"
        raise CheckpointError(f"{path}: a header of {length} bytes is {limit}")
    if length > file_bytes - 8:
        raise CheckpointError(f"{path}: truncated: header of {length} bytes in a file of {file_bytes}")
    raw = np.empty(length, dtype=np.uint8)
    fill(path, fd, 8, raw)
    return raw.tobytes()


def _metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    return value


def _entry(path: Path, name: str, entry: object, data_start: int, file_bytes: int) -> StoredTensor:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: must have exactly dtype, shape and data_offsets")
    known = StoredDtype.__members__
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in known:
        raise CheckpointError(f"{where}: unknown dtype {entry['dtype']!r}; known: {', '.join(known)}")
    dtype = known[entry["dtype"]]
    shape = _counts(f"{where}: shape", entry["shape"])
    offsets = _counts(f"{where}: data_offsets", entry["data_offsets"])
    if len(shape) > _MAX_RANK or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: bad rank {len(shape)} or offsets {list(offsets[:2])}")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        given = offsets[1] - offsets[0]
        raise CheckpointError(f"{where}: {dtype} {list(shape)} takes {nbytes} bytes, the header gives {given}")
    if data_start + offsets[1] > file_bytes:
        raise CheckpointError(f"{where}: truncated: ends at byte {data_start + offsets[1]} of a file of {file_bytes}")
    return StoredTensor(name, path, dtype, shape, data_start + offsets[0], nbytes)


def _counts(what: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n <= _MAX_COUNT for n in value):
        raise CheckpointError(f"{what} must be a list of whole numbers from 0 to 2^48")
    return tuple(value)


def _check_layout(path: Path, tensors: Iterable[StoredTensor], data_start: int, file_bytes: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    end = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            what = "overlaps the one before it" if tensor.start < end else f"leaves a hole at byte {end}"
            raise CheckpointError(f"{path}: tensor {tensor.name!r}: starts at byte {tensor.start} and {what}")
        end += tensor.nbytes
    if end != file_bytes:
        raise CheckpointError(f"{path}: {file_bytes - end} bytes at the end belong to no tensor")
