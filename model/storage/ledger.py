"""What a checkpoint on disk holds, and whose it is: everything that can be known without making a tensor.

Opening parses the configuration and every header, and keeps a ledger: each stored tensor has exactly one
owner, each tensor that the model needs is there once with the right shape. So every actor opens the whole checkpoint
cheaply. Who only plans, counts or compares needs no torch; reading tensors is `model.storage.checkpoint`'s. Names are
`model.storage.tensor_names`' work, files `model.storage.weight_files`' and `model.storage.safetensors_header`'s,
making a manifest `model.storage.integrity`'s.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from model.config import ModelConfig
from model.storage.config_reader import config_from, config_path
from model.storage.safetensors_header import CheckpointError, SafetensorsHeader, StoredTensor, fill, opened
from model.storage.stored_dtype import WEIGHT_DTYPES, StoredDtype
from model.storage.tensor_names import (
    COORDINATOR,
    Expert,
    Owner,
    Source,
    TensorSpec,
    is_ignored,
    tensor_specs,
    tied_copies,
)
from model.storage.weight_files import open_weights

__all__ = ["COORDINATOR", "CheckpointError", "Expert", "Ledger", "Owner", "Place"]

_SAMPLE_BYTES = 64
_LINEAR_SUFFIXES = (".wq", ".wk", ".wv", ".wo", ".w1", ".w2", ".w3", "lm_head")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one canonical tensor lies: in `stored`, from byte `start` of its file."""

    shape: tuple[int, ...]
    owner: Owner
    stored: StoredTensor
    start: int
    interleaved_heads: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.stored.dtype.itemsize


@dataclass(frozen=True, eq=False, repr=False)
class Ledger:
    """A model's weights by canonical name: where each lies, who owns it. Holds no file open.

    `places` are by canonical name, `tied_copy` is a needless second copy of the embeddings. `checksums` are what the
    tensors are held to, by canonical name.
    """

    path: Path
    config: ModelConfig
    headers_id: str
    places: Mapping[str, Place]
    tied_copy: StoredTensor | None
    checksums: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Parse the configuration and all headers, and settle who owns what; no weight is read.

        Raises ModelConfigError for the configuration, CheckpointError naming file and tensor for the rest.
        """
        path = Path(path)
        config_file = config_path(path)
        config = config_from(config_file, path)
        files = open_weights(path)
        copy = _tied_copy(config, files.tensors)
        places = _places(path, config, files.tensors)
        return cls(path, config, _headers_id(config_file, files.headers), places, copy)

    def expecting(self, checksums: Mapping[str, int]) -> Self:
        """The same, whose tensors are held to these CRC-32Cs, by canonical name."""
        return replace(self, checksums=checksums)

    def stored(self, name: str) -> tuple[StoredTensor, int, int]:
        """The stored tensor that holds this one, and where in it: from which byte on, how many."""
        place = self.place(name)
        return place.stored, place.start - place.stored.start, place.nbytes

    @cached_property
    def content_id(self) -> str:
        """A hash of the configuration and of every tensor's checksum, however the tensors lie in files.

        Where checksums are not known, `weights_id`.
        """
        if not self.places.keys() <= self.checksums.keys():
            return self.weights_id
        digest = hashlib.sha256(repr(self.config).encode())
        for name, place in sorted(self.places.items()):
            digest.update(
                f"\n{name} {place.stored.dtype} {place.interleaved_heads} {self.checksums[name]:08x}".encode()
            )
        return digest.hexdigest()

    @cached_property
    def weights_id(self) -> str:
        """A hash of the configuration, all headers and 64 bytes amid every tensor, which are read when first asked for.

        Two checkpoints of one shape differ in it wherever training changed the weights.
        """
        digest = hashlib.sha256(self.headers_id.encode())
        for place in self.places.values():
            sample = np.empty(min(_SAMPLE_BYTES, place.nbytes), dtype=np.uint8)
            with opened(place.stored.path) as fd:
                fill(place.stored.path, fd, place.start + (place.nbytes - len(sample)) // 2, sample)
            digest.update(sample.tobytes())
        return digest.hexdigest()

    @property
    def stored_dtype(self) -> StoredDtype:
        """The dtype of the linear weights, the router aside; where they differ, the one that holds all."""
        linear = {place.stored.dtype for name, place in self.places.items() if name.endswith(_LINEAR_SUFFIXES)}
        return linear.pop() if len(linear) == 1 else StoredDtype.F32

    @property
    def owners(self) -> tuple[Owner, ...]:
        """The coordinator and every expert."""
        return (COORDINATOR, *(Expert(expert) for expert in range(self.config.num_experts)))

    def owner(self, name: str) -> Owner:
        """`COORDINATOR` or `Expert(e)`."""
        return self.place(name).owner

    def names(self, owner: Owner) -> tuple[str, ...]:
        """The canonical names that an owner holds, in the order of use."""
        return tuple(name for name, place in self.places.items() if place.owner == owner)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, in this house's order of dimensions."""
        return self.place(name).shape

    def nbytes(self, name: str) -> int:
        """The bytes that the tensor takes in its file."""
        return self.place(name).nbytes

    def owned_bytes(self, owner: Owner) -> int:
        """The bytes in files of all tensors of an owner."""
        return sum(place.nbytes for place in self.places.values() if place.owner == owner)

    def place(self, name: str) -> Place:
        """Where a tensor lies. Raises CheckpointError for a name that this model does not have."""
        if name not in self.places:
            raise CheckpointError(f"{self.path}: this model has no tensor named {name!r}")
        return self.places[name]


def _places(path: Path, config: ModelConfig, tensors: dict[str, StoredTensor]) -> dict[str, Place]:
    """Give every needed tensor its place and every stored tensor its owner, or refuse by name."""
    places: dict[str, Place] = {}
    owned = {source.stored for source in tied_copies(config)}
    for spec in tensor_specs(config):
        source = _only_source(path, spec, tensors)
        stored = tensors[source.stored]
        _check(stored, source)
        start = stored.start + source.first * stored.dtype.itemsize
        places[spec.name] = Place(spec.shape, spec.owner, stored, start, source.interleaved_heads)
        owned.add(stored.name)
    for name, stored in tensors.items():
        if name not in owned and not is_ignored(name, config):
            raise CheckpointError(f"{stored.path}: tensor {name!r} is unknown, no part of this model owns it")
    return places


def _only_source(path: Path, spec: TensorSpec, tensors: dict[str, StoredTensor]) -> Source:
    found = [source for source in spec.sources if source.stored in tensors]
    if not found:
        looked_for = ", ".join(repr(source.stored) for source in spec.sources)
        raise CheckpointError(f"{path}: tensor {spec.name!r} is missing (looked for {looked_for})")
    if len(found) > 1:
        first, second = tensors[found[0].stored], tensors[found[1].stored]
        both = f"{first.name!r} of {first.path.name}: both are {spec.name!r}"
        raise CheckpointError(f"{second.path}: tensor {second.name!r} duplicates {both}")
    return found[0]


def _check(stored: StoredTensor, source: Source) -> None:
    where = f"{stored.path}: tensor {stored.name!r}"
    if stored.shape != source.stored_shape:
        raise CheckpointError(
            f"{where}: has shape {list(stored.shape)}, the configuration asks for {list(source.stored_shape)}"
        )
    if stored.dtype not in WEIGHT_DTYPES:
        allowed = ", ".join(map(str, WEIGHT_DTYPES))
        raise CheckpointError(f"{where}: has dtype {stored.dtype}, weights must be one of {allowed}")


def _tied_copy(config: ModelConfig, tensors: dict[str, StoredTensor]) -> StoredTensor | None:
    found = [source for source in tied_copies(config) if source.stored in tensors]
    for source in found:
        _check(tensors[source.stored], source)
    if len(found) > 1:
        second = tensors[found[1].stored]
        raise CheckpointError(f"{second.path}: tensor {second.name!r} duplicates {found[0].stored!r}")
    return tensors[found[0].stored] if found else None


def damaged(name: str, stored: StoredTensor, expected: int | None, found: int) -> CheckpointError:
    """The error for a tensor whose bytes are not those that it is held to."""
    return CheckpointError(
        f"{stored.path}: tensor {stored.name!r} ({name}) is damaged, or was replaced: its CRC-32C is {found:08x}, "
        f"the manifest says {expected:08x}"
    )


def _headers_id(config_file: Path, headers: Iterable[SafetensorsHeader]) -> str:
    """A hash of the configuration and all headers: names, shapes, places; nothing of the weights' values."""
    digest = hashlib.sha256()
    for name, content in [(config_file.name, config_file.read_bytes())] + [(h.path.name, h.raw) for h in headers]:
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()
