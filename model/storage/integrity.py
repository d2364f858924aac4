"""Holds a checkpoint to its manifest, which is found, or made of the files as they are.

Looked for beside the weights, then in a directory of one's own, where it is kept for weights that lie in a place that
cannot be written to. What the tensors are read for, and what becomes of one that is damaged, is their readers'.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.storage.ledger import Ledger, damaged
from model.storage.manifest import MANIFEST_NAME, FileHint, Manifest, TensorRecord
from model.storage.safetensors_header import CheckpointError, StoredTensor, range_checksum

LOG = logging.getLogger(__name__)

OnBytes = Callable[[int], None]
"""Told of so many more bytes that were read."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A checkpoint that is held to the manifest at `manifest` (None: nowhere could one be written).

    `made` says that the manifest is new: the weights are believed to be what they are now.
    """

    checkpoint: Ledger
    manifest: Path | None
    made: bool


def verified(checkpoint: Ledger, own_dir: Path, on_bytes: OnBytes = lambda _count: None) -> Verified:
    """The checkpoint, held to its manifest; without one every tensor is read once to make it.

    Several processes may do so at once. Raises CheckpointError for a manifest that is none, or of other tensors.
    """
    beside, elsewhere = manifest_places(checkpoint, own_dir)
    for path in (beside, elsewhere):
        if path.is_file():
            manifest = Manifest.read(path)
            _note_changes(checkpoint, manifest)
            return Verified(checkpoint.expecting(_checksums(checkpoint, manifest, path)), path, False)
    manifest = make_manifest(checkpoint, on_bytes)
    expecting = checkpoint.expecting(_checksums(checkpoint, manifest, beside))
    for path in (beside, elsewhere):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            manifest.write(path)
            return Verified(expecting, path, True)
        except OSError as error:
            LOG.info("no manifest at %s: %s", path, error)
    return Verified(expecting, None, True)


def manifest_places(checkpoint: Ledger, own_dir: Path) -> tuple[Path, Path]:
    """Where its manifest may lie: beside the weights; in `own_dir`, by its path, so that weights cannot be mistaken."""
    path = checkpoint.path.resolve()
    key = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return checkpoint.path / MANIFEST_NAME, own_dir / "manifests" / f"{path.name}-{key}.json"


def make_manifest(checkpoint: Ledger, on_bytes: OnBytes = lambda _count: None) -> Manifest:
    """Reads every tensor, in the order of the files. Raises CheckpointError."""
    sizes: dict[str, int] = {}
    tensors: dict[str, StoredTensor] = {}
    for owner in checkpoint.owners:
        for name in checkpoint.names(owner):
            stored, _, sizes[stored.name] = checkpoint.stored(name)
            tensors[stored.name] = stored
    records: dict[str, TensorRecord] = {}
    for stored in sorted(tensors.values(), key=lambda one: (one.path.name, one.start)):
        size = sizes[stored.name]
        places = range(stored.start, stored.start + stored.nbytes, size)
        parts = tuple(range_checksum(stored.path, start, size, on_bytes) for start in places)
        records[stored.name] = TensorRecord.of(stored, parts)
    paths = {stored.path for stored in tensors.values()}
    return Manifest(records, {path.name: FileHint.of(path) for path in sorted(paths)})


def compare(checkpoint: Ledger, on_bytes: OnBytes = lambda _count: None) -> int:
    """Reads every tensor of a checkpoint that is held to its manifest; returns how many there are.

    Raises CheckpointError naming file and tensor for the first whose bytes differ.
    """
    names = [name for owner in checkpoint.owners for name in checkpoint.names(owner)]
    for name in sorted(names, key=lambda one: _place(checkpoint, one)):
        stored, first, size = checkpoint.stored(name)
        expected = checkpoint.checksums[name]
        found = range_checksum(stored.path, stored.start + first, size, on_bytes)
        if found != expected:
            raise damaged(name, stored, expected, found)
    return len(names)


def _place(checkpoint: Ledger, name: str) -> tuple[str, int]:
    stored, first, _ = checkpoint.stored(name)
    return stored.path.name, stored.start + first


def _checksums(checkpoint: Ledger, manifest: Manifest, path: Path) -> dict[str, int]:
    """By canonical name. Raises CheckpointError unless the manifest is of these very tensors."""
    found: dict[str, int] = {}
    changed: defaultdict[str, list[str]] = defaultdict(list)
    for owner in checkpoint.owners:
        for name in checkpoint.names(owner):
            stored, first, size = checkpoint.stored(name)
            record = manifest.tensors.get(stored.name)
            if record is None or not _is_of(record, stored, size):
                changed[stored.path.name].append(stored.name)
            else:
                found[name] = record.parts[first // size]
    if changed:
        file, names = next(iter(changed.items()))
        raise CheckpointError(
            f"{path}: does not describe tensor {names[0]!r} of {file} as it is; "
            "if the weights were replaced on purpose, remove this manifest, and a new one is made"
        )
    return found


def _note_changes(checkpoint: Ledger, manifest: Manifest) -> None:
    """A file's time proves nothing either way: it only helps who looks for the reason of a difference."""
    for name, hint in manifest.files.items():
        path = checkpoint.path / name
        if path.is_file() and FileHint.of(path) != hint:
            LOG.info("%s was written, or copied, after its manifest was made", path)


def _is_of(record: TensorRecord, stored: StoredTensor, size: int) -> bool:
    same = (record.file, record.dtype) == (stored.path.name, stored.dtype.label) and record.shape == stored.shape
    return same and record.nbytes == stored.nbytes and len(record.parts) * size == stored.nbytes
