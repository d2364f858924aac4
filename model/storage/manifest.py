"""The manifest of a checkpoint: what bytes every stored tensor has, by checksum, in a JSON file beside it.

It is made with the checkpoint, or of the files as they are when they are first served, and is what they are held to
ever after. A tensor that several owners read parts of, as in layouts that fuse the experts, has a checksum for each
part. Comparing is `model.storage.integrity`'s and `model.storage.checkpoint`'s.
"""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.storage.safetensors_header import MAX_HEADER_BYTES, CheckpointError, StoredTensor
from model.storage.strict_json import JSONError, read_object

MANIFEST_NAME = "octavo-manifest.json"
VERSION = 1
ALGORITHM = "crc32c"


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One stored tensor; `parts` are the checksums of its bytes in so many equal parts, in order."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    parts: tuple[int, ...]

    @classmethod
    def of(cls, stored: StoredTensor, parts: tuple[int, ...]) -> "TensorRecord":
        return cls(stored.path.name, stored.dtype.label, stored.shape, stored.nbytes, parts)


@dataclass(frozen=True, slots=True)
class FileHint:
    """How a file looked when its tensors were read: no proof of anything, but a help to find out what happened."""

    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileHint":
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Manifest:
    """`tensors` by stored name, `files` by file name."""

    tensors: Mapping[str, TensorRecord]
    files: Mapping[str, FileHint]

    def content(self) -> dict[str, object]:
        """What the file says, as plain values."""
        return {
            "version": VERSION,
            "algorithm": ALGORITHM,
            "files": {name: {"bytes": hint.nbytes, "mtime_ns": hint.mtime_ns} for name, hint in self.files.items()},
            "tensors": {
                name: {
                    "file": record.file,
                    "dtype": record.dtype,
                    "shape": list(record.shape),
                    "bytes": record.nbytes,
                    "checksums": [f"{part:08x}" for part in record.parts],
                }
                for name, record in self.tensors.items()
            },
        }

    def write(self, path: Path) -> None:
        """Writes the file whole or not at all. Raises OSError."""
        partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        try:
            with partial.open("x", encoding="utf-8") as file:
                json.dump(self.content(), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Raises CheckpointError, naming the file, for one that is no manifest of this version."""
        try:
            content, _ = read_object(path, MAX_HEADER_BYTES)
            if (content.get("version"), content.get("algorithm")) != (VERSION, ALGORITHM):
                said = f"version {content.get('version')!r} of {content.get('algorithm')!r}"
                raise CheckpointError(f"{path}: {said}, this side knows {VERSION} of {ALGORITHM!r}")
            return cls(
                {name: _record(entry) for name, entry in _object(content.get("tensors")).items()},
                {name: _hint(entry) for name, entry in _object(content.get("files")).items()},
            )
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        except (JSONError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path}: not a manifest ({type(error).__name__}: {error})") from None


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {type(value).__name__}")
    return value


def _record(value: object) -> TensorRecord:
    entry = _object(value)
    shape, parts = entry["shape"], entry["checksums"]
    if not isinstance(shape, list) or not isinstance(parts, list) or not parts:
        raise TypeError("shape and checksums must be lists")
    checksums = tuple(int(str(part), 16) for part in parts)
    return TensorRecord(
        str(entry["file"]), str(entry["dtype"]), tuple(map(int, shape)), int(str(entry["bytes"])), checksums
    )


def _hint(value: object) -> FileHint:
    entry = _object(value)
    return FileHint(int(str(entry["bytes"])), int(str(entry["mtime_ns"])))
