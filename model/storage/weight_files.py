"""Which safetensors files make up a checkpoint, and whether they agree with the index that lists them.

Knows file names and JSON indexes, not models: what the tensors mean is `model.storage.ledger`'s work.
"""

from dataclasses import dataclass
from pathlib import Path

from model.storage.safetensors_header import (
    MAX_HEADER_BYTES,
    CheckpointError,
    SafetensorsHeader,
    StoredTensor,
    read_header,
)
from model.storage.strict_json import JSONError, read_object

_STEMS = ("model", "consolidated")  # Hugging Face's first: repositories that hold both formats hold one model
_OTHER_FORMATS = ("pytorch_model*.bin", "consolidated*.pt*", "*.gguf")
_MAX_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The headers of a checkpoint's files, by file name, and all their tensors by stored name."""

    headers: tuple[SafetensorsHeader, ...]
    tensors: dict[str, StoredTensor]


def index_name(stem: str = "model") -> str:
    """The name of the index of a sharded checkpoint."""
    return f"{stem}.safetensors.index.json"


def shard_name(number: int, total: int, stem: str = "model") -> str:
    """The name of shard `number`, counted from 1, as Hugging Face writes it."""
    return f"{stem}-{number:05d}-of-{total:05d}.safetensors"


def find_weights(model_dir: Path) -> Path | None:
    """The file to start from, an index or a single safetensors file; None where there are no weights.

    Raises CheckpointError where a single file and an index of the same name stand side by side.
    """
    for stem in _STEMS:
        index, single = model_dir / index_name(stem), model_dir / f"{stem}.safetensors"
        if index.is_file() and single.is_file():
            raise CheckpointError(f"{model_dir} holds both {index.name} and {single.name}; keep one")
        if index.is_file() or single.is_file():
            return index if index.is_file() else single
    return None


def open_weights(model_dir: Path) -> WeightFiles:
    """Read every header. Raises CheckpointError for files missing, left over, or at odds with the index."""
    start = find_weights(model_dir)
    if start is None:
        looked_for = [name for stem in _STEMS for name in (f"{stem}.safetensors", index_name(stem))]
        others = sorted(path.name for pattern in _OTHER_FORMATS for path in model_dir.glob(pattern))
        convert = f"; {others[0]} must be converted to safetensors first" if others else ""
        raise CheckpointError(f"{model_dir} holds no safetensors weights (looked for {', '.join(looked_for)}){convert}")
    if start.name.endswith(".index.json"):
        return _open_sharded(start)
    header = read_header(start)
    return WeightFiles((header,), header.tensors)


def _open_sharded(index: Path) -> WeightFiles:
    placed = _weight_map(index)
    _refuse_left_over(index, set(placed.values()))
    for name, shard in placed.items():
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index.parent / shard}: missing shard, which should hold tensor {name!r}")
    headers = tuple(read_header(index.parent / shard) for shard in sorted(set(placed.values())))
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                other = tensors[name].path.name
                raise CheckpointError(f"{header.path}: tensor {name!r} is also in {other}")
            if placed.get(name) != header.path.name:
                where = f"in {placed[name]}" if name in placed else "nowhere"
                raise CheckpointError(f"{header.path}: tensor {name!r}: {index.name} says it is {where}")
            tensors[name] = tensor
    for name, shard in placed.items():
        if name not in tensors:
            raise CheckpointError(f"{index.parent / shard}: tensor {name!r} is missing, {index.name} lists it")
    return WeightFiles(headers, tensors)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name. File names are plain: an index may not point outside its directory."""
    try:
        content, _ = read_object(index, MAX_HEADER_BYTES)
    except JSONError as error:
        raise CheckpointError(f"{index}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}") from error
    placed = content.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{index}: field 'weight_map' must be a non-empty object")
    for name, shard in placed.items():
        plain = isinstance(shard, str) and shard.isprintable() and Path(shard).name == shard
        plain = plain and len(shard.encode()) <= _MAX_NAME_BYTES
        if not plain or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: tensor {name!r}: {shard!r} is not the name of a safetensors file")
    return placed


def _refuse_left_over(index: Path, listed: set[str]) -> None:
    stem = index.name.removesuffix(".safetensors.index.json")
    for path in sorted(index.parent.glob(f"{stem}-*-of-*.safetensors")):
        if path.name not in listed:
            raise CheckpointError(f"{path}: a shard that {index.name} does not list")
