"""Write a sharded safetensors checkpoint tensor by tensor: memory holds one tensor, never the model.

Every shard is written under a temporary name behind a header region of fixed size (the format allows trailing
spaces in a header), because what it will hold is not known when it is begun. The index comes last and by
rename, after the manifest with everybody's checksums, and shards without an index do not open: a crash at any
moment leaves nothing that could be taken for a checkpoint, and the next writer clears it away. Configuration and
tokenizer files are the caller's, to be written before the index.
"""

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from model.checksum import checksum
from model.storage.manifest import MANIFEST_NAME, FileHint, Manifest, TensorRecord
from model.storage.safetensors_header import SLICE_BYTES, CheckpointError
from model.storage.strict_json import JSONError, read_object
from model.storage.torch_dtypes import to_stored
from model.storage.weight_files import find_weights, index_name, shard_name

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DATA_START = 128 << 10  # whole pages, with room for the entries of a thousand tensors
_JOURNAL = ".model.publishing.json"
_PARTIAL_SUFFIX = ".model.partial"
_SHARD_NAME = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


class ShardedWriter:
    """Streams tensors into `dest` as `model-0000k-of-0000n.safetensors` and `model.safetensors.index.json`.

    A context manager: a clean exit publishes the checkpoint, an exception removes what was written. A shard
    is closed before its tensors would exceed `max_shard_bytes`; a larger tensor gets a shard of its own.
    `metadata` goes into every shard. `on_tensor(name, nbytes)` is called after each tensor. Raises
    CheckpointError where `dest` already holds weights, where another process is writing there, and where the
    disk refuses.
    """

    def __init__(
        self,
        dest: Path | str,
        *,
        max_shard_bytes: int,
        metadata: Mapping[str, str],
        on_tensor: Callable[[str, int], None] | None = None,
    ) -> None:
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
        self._dest = Path(dest)
        self._max_shard_bytes = max_shard_bytes
        self._metadata = dict(metadata)
        self._on_tensor = on_tensor
        self._dir_fd = -1
        self._shard: _Shard | None = None
        self._shard_of: dict[str, int] = {}
        self._records: dict[str, TensorRecord] = {}
        self._num_shards = 0
        self._total_bytes = 0

    def __enter__(self) -> "ShardedWriter":
        with _disk_errors(self._dest):
            self._dest.mkdir(parents=True, exist_ok=True)
            self._dir_fd = os.open(self._dest, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._claim()
            except BaseException:
                os.close(self._dir_fd)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with _disk_errors(self._dest):
                try:
                    if error is None:
                        self._publish()
                finally:
                    if self._shard is not None:
                        self._shard.abandon()
                    _clear_wreck(self._dest)
        finally:
            os.close(self._dir_fd)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor under its stored name, in its own dtype (float32, float16 or bfloat16)."""
        if name in self._shard_of:
            raise CheckpointError(f"{self._dest}: tensor {name!r} is written twice")
        if tensor.dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"{self._dest}: tensor {name!r}: dtype {tensor.dtype} cannot be written")
        with _disk_errors(self._dest):
            if self._shard is not None and not self._shard.has_room(name, tensor, self._max_shard_bytes):
                self._shard.finish()
                self._shard = None
            if self._shard is None:
                self._num_shards += 1
                self._shard = _Shard(self._partial(self._num_shards), self._metadata)
            crc = self._shard.append(name, tensor)
        self._shard_of[name] = self._num_shards
        self._records[name] = TensorRecord(
            "", to_stored(tensor.dtype).label, tuple(tensor.shape), tensor.nbytes, (crc,)
        )
        self._total_bytes += tensor.nbytes
        if self._on_tensor is not None:
            self._on_tensor(name, tensor.nbytes)

    def _claim(self) -> None:
        """Lock the directory, clear away what a crashed writer left, and refuse a place that is taken."""
        try:
            fcntl.flock(self._dir_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{self._dest}: another process is writing a checkpoint there") from None
        _clear_wreck(self._dest)
        taken = [find_weights(self._dest), *self._dest.glob("model-*-of-*.safetensors")]
        for path in taken:
            if path is not None:
                raise CheckpointError(f"{path}: already exists; a checkpoint is written to a place without one")

    def _publish(self) -> None:
        if self._shard is None:
            raise CheckpointError(f"{self._dest}: no tensor was written")
        self._shard.finish()
        self._shard = None
        names = {k: shard_name(k, self._num_shards) for k in range(1, self._num_shards + 1)}
        self._write_whole(_JOURNAL, {"shards": list(names.values())})
        for number, name in names.items():
            self._partial(number).rename(self._dest / name)
        os.fsync(self._dir_fd)
        self._write_manifest(names)
        weight_map = {name: names[number] for name, number in sorted(self._shard_of.items())}
        self._write_whole(index_name(), {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})

    def _write_manifest(self, shard_names: Mapping[int, str]) -> None:
        records = {name: replace(one, file=shard_names[self._shard_of[name]]) for name, one in self._records.items()}
        hints = {name: FileHint.of(self._dest / name) for name in shard_names.values()}
        self._write_whole(MANIFEST_NAME, Manifest(records, hints).content())

    def _write_whole(self, name: str, content: Mapping[str, object]) -> None:
        """Write a JSON file so that it exists whole or not at all."""
        partial = self._dest / f".{name}{_PARTIAL_SUFFIX}"
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self._dest / name)
        os.fsync(self._dir_fd)

    def _partial(self, number: int) -> Path:
        return self._dest / f".{number:05d}{_PARTIAL_SUFFIX}"


class _Shard:
    """One safetensors file being written: tensors go behind a header region that is filled in at the end."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._path = path
        self._entries: dict[str, object] = {"__metadata__": metadata}
        self._header_bytes = len(_encode(self._entries))
        self._data_bytes = 0
        self._file = path.open("xb")
        self._file.seek(_DATA_START)

    def has_room(self, name: str, tensor: Tensor, max_bytes: int) -> bool:
        """False where the tensor would overfill data or header, or start where its dtype cannot."""
        return (
            self._data_bytes + tensor.nbytes <= max_bytes
            and self._header_bytes + self._entry_bytes(name, tensor) <= _DATA_START - 8
            and self._data_bytes % tensor.itemsize == 0
        )

    def append(self, name: str, tensor: Tensor) -> int:
        """Returns the CRC-32C of what was written."""
        entry_bytes = self._entry_bytes(name, tensor)
        if self._header_bytes + entry_bytes > _DATA_START - 8:
            raise CheckpointError(f"{self._path}: tensor {name[:80]!r}: name or metadata are too long for a header")
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        self._file.write(data.data)
        self._entries[name] = self._entry(tensor)
        self._header_bytes += entry_bytes
        self._data_bytes += tensor.nbytes
        return checksum(data)

    def finish(self) -> None:
        """Fill in the header and bring the file to the disk."""
        with self._file as file:
            file.seek(0)
            file.write((_DATA_START - 8).to_bytes(8, "little"))
            file.write(_encode(self._entries).ljust(_DATA_START - 8))
            file.flush()
            os.fsync(file.fileno())

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def _entry(self, tensor: Tensor) -> dict[str, object]:
        offsets = [self._data_bytes, self._data_bytes + tensor.nbytes]
        return {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}

    def _entry_bytes(self, name: str, tensor: Tensor) -> int:
        return len(_encode({name: self._entry(tensor)}))


def _encode(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _clear_wreck(dest: Path) -> None:
    """Remove what an unfinished writer left: temporary files, and shards that no index lists."""
    journal = dest / _JOURNAL
    if journal.is_file():
        if not (dest / index_name()).is_file():
            for name in (*_journalled(journal), MANIFEST_NAME):
                (dest / name).unlink(missing_ok=True)
        journal.unlink()
    for path in dest.glob(f".*{_PARTIAL_SUFFIX}"):
        path.unlink()


def _journalled(journal: Path) -> list[str]:
    try:
        content, _ = read_object(journal, SLICE_BYTES)
    except JSONError as error:
        raise CheckpointError(f"{journal}: {error}; remove it by hand") from None
    shards = content.get("shards")
    names = shards if isinstance(shards, list) else []
    return [name for name in names if isinstance(name, str) and _SHARD_NAME.fullmatch(name)]


@contextmanager
def _disk_errors(dest: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or dest}: cannot be written: {error.strerror}") from error
