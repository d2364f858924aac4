"""A checkpoint on disk, read tensor by tensor under this house's names.

What it holds and whose it is, is `model.storage.ledger`'s knowledge. Reading takes exactly one tensor's byte range:
every actor reads only what it owns. What it reads is held to the checksums of a manifest, where there is one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.storage.ledger import COORDINATOR, CheckpointError, Expert, Ledger, Owner, Place, damaged
from model.storage.safetensors_file import read_into, read_slices
from model.storage.safetensors_header import RunningChecksum, StoredTensor
from model.storage.torch_dtypes import to_torch

__all__ = ["COORDINATOR", "Checkpoint", "CheckpointError", "Expert", "Owner"]


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint(Ledger):
    """A model's weights, readable by canonical name from any number of processes.

    `on_bytes(count)` is called for every quarter of a MiB or less that `read` brings in.
    """

    on_bytes: Callable[[int], None] | None = None

    def paced(self, on_bytes: Callable[[int], None]) -> "Checkpoint":
        """The same checkpoint, whose `read` calls `on_bytes(count)` for every quarter of a MiB or less, and waits."""
        return replace(self, on_bytes=on_bytes)

    @property
    def dtype(self) -> torch.dtype:
        """`stored_dtype` in torch's words."""
        return to_torch(self.stored_dtype)

    def read(self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Tensor:
        """Read one tensor, of the stored dtype unless another is given; rotary rows in half-rotation order.

        Allocates the tensor and at most 8 MiB beside it. Raises CheckpointError where the bytes have another
        checksum than they should or the file changed since `open`, and for "embed" where tied embeddings are
        kept twice and the two differ.
        """
        place = self.place(name)
        if name == "embed" and self.tied_copy is not None:
            _refuse_difference(place, self.tied_copy)
        stored = place.stored
        expected = self.checksums.get(name)
        check = None if expected is None and self.on_bytes is None else RunningChecksum(self.on_bytes)
        own = to_torch(stored.dtype)
        target = torch.empty(place.shape, dtype=dtype or own, device=device)
        if place.interleaved_heads:
            _read_interleaved(place, target, check)
        elif target.device.type == "cpu" and target.dtype == own:
            read_into(stored.path, place.start, target, check)
        else:
            _read_converting(stored, place.start, target.view(-1), check)
        if check is not None and expected is not None and check.value != expected:
            raise damaged(name, stored, expected, check.value)
        return target


def _refuse_difference(embed: Place, copy: StoredTensor) -> None:
    """Compare two stored tensors slice by slice."""
    stored = embed.stored
    same = stored.dtype == copy.dtype and all(
        torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        for ours, theirs in zip(
            read_slices(stored.path, stored.start, embed.numel, to_torch(stored.dtype)),
            read_slices(copy.path, copy.start, embed.numel, to_torch(copy.dtype)),
            strict=True,
        )
    )
    if not same:
        raise CheckpointError(
            f"{copy.path}: tensor {copy.name!r} differs from {stored.name!r}, but the configuration ties them"
        )


def _read_converting(stored: StoredTensor, start: int, target: Tensor, check: RunningChecksum | None) -> None:
    first = 0
    for part in read_slices(stored.path, start, target.numel(), to_torch(stored.dtype), check=check):
        target[first : first + len(part)].copy_(part)
        first += len(part)


def _read_interleaved(place: Place, target: Tensor, check: RunningChecksum | None) -> None:
    """Bring each head's rows from (pair 0, pair 1, …) to (all firsts, all seconds)."""
    heads, (rows, width), stored = place.interleaved_heads, place.shape, place.stored
    half = rows // heads // 2
    for head, halves in enumerate(target.view(heads, 2, half, width)):
        pairs = halves.transpose(0, 1)
        start = place.start + head * 2 * half * width * stored.dtype.itemsize
        first = 0
        for part in read_slices(stored.path, start, 2 * half * width, to_torch(stored.dtype), 2 * width, check):
            count = len(part) // (2 * width)
            pairs[first : first + count].copy_(part.view(count, 2, width))
            first += count
