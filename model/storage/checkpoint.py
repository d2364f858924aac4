"""A checkpoint on disk, opened and read tensor by tensor under this house's names.

Opening parses the configuration and every header, and keeps a ledger: each stored tensor has exactly one
owner, each tensor that the model needs is there once with the right shape. Reading takes exactly one tensor's
byte range. So every actor opens the whole checkpoint cheaply and reads only what it owns. What it reads is
held to the checksums of a manifest, where there is one. Names are `model.storage.tensor_names`' work, files
`model.storage.weight_files`' and `model.storage.safetensors_file`'s, making a manifest `model.storage.integrity`'s.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.storage.config_reader import config_from, config_path
from model.storage.safetensors_file import (
    CheckpointError,
    RunningChecksum,
    SafetensorsHeader,
    StoredTensor,
    read_into,
    read_slices,
)
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

__all__ = ["COORDINATOR", "Checkpoint", "CheckpointError", "Expert", "Owner"]

_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SAMPLE_BYTES = 64
_LINEAR_SUFFIXES = (".wq", ".wk", ".wv", ".wo", ".w1", ".w2", ".w3", "lm_head")


@dataclass(frozen=True, slots=True)
class _Place:
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


class Checkpoint:
    """A model's weights, readable by canonical name from any number of processes. Holds no file open."""

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        headers_id: str,
        places: dict[str, _Place],
        copy: StoredTensor | None,
        checksums: Mapping[str, int] | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self._headers_id = headers_id
        self._places = places
        self._tied_copy = copy
        self._checksums: Mapping[str, int] = {} if checksums is None else checksums
        self._on_bytes = on_bytes

    @classmethod
    def open(cls, path: Path | str) -> "Checkpoint":
        """Parse the configuration and all headers, and settle who owns what; no weight is read.

        Raises ModelConfigError for the configuration, CheckpointError naming file and tensor for the rest.
        """
        path = Path(path)
        config_file = config_path(path)
        config = config_from(config_file, path)
        files = open_weights(path)
        copy = _tied_copy(config, files.tensors)
        places = _ledger(path, config, files.tensors)
        return cls(path, config, _headers_id(config_file, files.headers), places, copy)

    def expecting(self, checksums: Mapping[str, int]) -> "Checkpoint":
        """The same checkpoint, whose `read` refuses bytes with another CRC-32C than that given for the name."""
        return Checkpoint(
            self.path, self.config, self._headers_id, self._places, self._tied_copy, checksums, self._on_bytes
        )

    def paced(self, on_bytes: Callable[[int], None]) -> "Checkpoint":
        """The same checkpoint, whose `read` calls `on_bytes(count)` for every quarter of a MiB or less, and waits."""
        return Checkpoint(
            self.path, self.config, self._headers_id, self._places, self._tied_copy, self._checksums, on_bytes
        )

    @property
    def checksums(self) -> Mapping[str, int]:
        """What `read` holds tensors to, by canonical name."""
        return self._checksums

    def stored(self, name: str) -> tuple[StoredTensor, int, int]:
        """The stored tensor that holds this one, and where in it: from which byte on, how many."""
        place = self._place(name)
        return place.stored, place.start - place.stored.start, place.nbytes

    @cached_property
    def content_id(self) -> str:
        """A hash of the configuration and of every tensor's checksum, however the tensors lie in files.

        Where checksums are not known, `weights_id`.
        """
        if not self._places.keys() <= self._checksums.keys():
            return self.weights_id
        digest = hashlib.sha256(repr(self.config).encode())
        for name, place in sorted(self._places.items()):
            digest.update(
                f"\n{name} {place.stored.dtype} {place.interleaved_heads} {self._checksums[name]:08x}".encode()
            )
        return digest.hexdigest()

    @cached_property
    def weights_id(self) -> str:
        """A hash of the configuration, all headers and 64 bytes amid every tensor, which are read when first asked for.

        Two checkpoints of one shape differ in it wherever training changed the weights.
        """
        digest = hashlib.sha256(self._headers_id.encode())
        for place in self._places.values():
            sample = torch.empty(min(_SAMPLE_BYTES, place.nbytes), dtype=torch.uint8)
            read_into(place.stored.path, place.start + (place.nbytes - len(sample)) // 2, sample)
            digest.update(sample.numpy().tobytes())
        return digest.hexdigest()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the linear weights, the router aside; where they differ, the one that holds all."""
        linear = {place.stored.dtype for name, place in self._places.items() if name.endswith(_LINEAR_SUFFIXES)}
        return reduce(torch.promote_types, linear)

    @property
    def owners(self) -> tuple[Owner, ...]:
        """The coordinator and every expert."""
        return (COORDINATOR, *(Expert(expert) for expert in range(self.config.num_experts)))

    def owner(self, name: str) -> Owner:
        """`COORDINATOR` or `Expert(e)`."""
        return self._place(name).owner

    def names(self, owner: Owner) -> tuple[str, ...]:
        """The canonical names that an owner holds, in the order of use."""
        return tuple(name for name, place in self._places.items() if place.owner == owner)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor that `read` returns."""
        return self._place(name).shape

    def nbytes(self, name: str) -> int:
        """The bytes that the tensor takes in its file."""
        return self._place(name).nbytes

    def owned_bytes(self, owner: Owner) -> int:
        """The bytes in files of all tensors of an owner."""
        return sum(place.nbytes for place in self._places.values() if place.owner == owner)

    def read(self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Tensor:
        """Read one tensor, of the stored dtype unless another is given; rotary rows in half-rotation order.

        Allocates the tensor and at most 8 MiB beside it. Raises CheckpointError where the bytes have another
        checksum than they should or the file changed since `open`, and for "embed" where tied embeddings are
        kept twice and the two differ.
        """
        place = self._place(name)
        if name == "embed" and self._tied_copy is not None:
            _refuse_difference(place, self._tied_copy)
        stored = place.stored
        expected = self._checksums.get(name)
        check = None if expected is None and self._on_bytes is None else RunningChecksum(self._on_bytes)
        target = torch.empty(place.shape, dtype=dtype or stored.dtype, device=device)
        if place.interleaved_heads:
            _read_interleaved(place, target, check)
        elif target.device.type == "cpu" and target.dtype == stored.dtype:
            read_into(stored.path, place.start, target, check)
        else:
            _read_converting(stored, place.start, target.view(-1), check)
        if check is not None and expected is not None and check.value != expected:
            raise damaged(name, stored, expected, check.value)
        return target

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise CheckpointError(f"{self.path}: this model has no tensor named {name!r}")
        return self._places[name]


def _ledger(path: Path, config: ModelConfig, tensors: dict[str, StoredTensor]) -> dict[str, _Place]:
    """Give every needed tensor its place and every stored tensor its owner, or refuse by name."""
    places: dict[str, _Place] = {}
    owned = {source.stored for source in tied_copies(config)}
    for spec in tensor_specs(config):
        source = _only_source(path, spec, tensors)
        stored = tensors[source.stored]
        _check(stored, source)
        start = stored.start + source.first * stored.dtype.itemsize
        places[spec.name] = _Place(spec.shape, spec.owner, stored, start, source.interleaved_heads)
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
    if stored.dtype not in _WEIGHT_DTYPES:
        raise CheckpointError(f"{where}: has dtype {stored.dtype}, weights must be one of {_WEIGHT_DTYPES}")


def _tied_copy(config: ModelConfig, tensors: dict[str, StoredTensor]) -> StoredTensor | None:
    found = [source for source in tied_copies(config) if source.stored in tensors]
    for source in found:
        _check(tensors[source.stored], source)
    if len(found) > 1:
        second = tensors[found[1].stored]
        raise CheckpointError(f"{second.path}: tensor {second.name!r} duplicates {found[0].stored!r}")
    return tensors[found[0].stored] if found else None


def _refuse_difference(embed: _Place, copy: StoredTensor) -> None:
    """Compare two stored tensors slice by slice."""
    stored = embed.stored
    same = stored.dtype == copy.dtype and all(
        torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        for ours, theirs in zip(
            read_slices(stored.path, stored.start, embed.numel, stored.dtype),
            read_slices(copy.path, copy.start, embed.numel, copy.dtype),
            strict=True,
        )
    )
    if not same:
        raise CheckpointError(
            f"{copy.path}: tensor {copy.name!r} differs from {stored.name!r}, but the configuration ties them"
        )


def damaged(name: str, stored: StoredTensor, expected: int | None, found: int) -> CheckpointError:
    """The error for a tensor whose bytes are not those that it is held to."""
    return CheckpointError(
        f"{stored.path}: tensor {stored.name!r} ({name}) is damaged, or was replaced: its CRC-32C is {found:08x}, "
        f"the manifest says {expected:08x}"
    )


def _read_converting(stored: StoredTensor, start: int, target: Tensor, check: RunningChecksum | None) -> None:
    first = 0
    for part in read_slices(stored.path, start, target.numel(), stored.dtype, check=check):
        target[first : first + len(part)].copy_(part)
        first += len(part)


def _read_interleaved(place: _Place, target: Tensor, check: RunningChecksum | None) -> None:
    """Bring each head's rows from (pair 0, pair 1, …) to (all firsts, all seconds)."""
    heads, (rows, width), stored = place.interleaved_heads, place.shape, place.stored
    half = rows // heads // 2
    for head, halves in enumerate(target.view(heads, 2, half, width)):
        pairs = halves.transpose(0, 1)
        start = place.start + head * 2 * half * width * stored.dtype.itemsize
        first = 0
        for part in read_slices(stored.path, start, 2 * half * width, stored.dtype, 2 * width, check):
            count = len(part) // (2 * width)
            pairs[first : first + count].copy_(part.view(count, 2, width))
            first += count


def _headers_id(config_file: Path, headers: Iterable[SafetensorsHeader]) -> str:
    """A hash of the configuration and all headers: names, shapes, places; nothing of the weights' values."""
    digest = hashlib.sha256()
    for name, content in [(config_file.name, config_file.read_bytes())] + [(h.path.name, h.raw) for h in headers]:
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()
