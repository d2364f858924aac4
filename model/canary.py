"""A canary: known rows through weights whose answers are remembered, so that a bit that flips in memory is noticed.

Rows are of ones and minus ones. A half-precision or integer weight then goes into its sum whole: unless the weights
of one output span more than fp32 has bits, no flipped bit is rounded away. Where a product rounds more than that,
the kernel shows the weights as they lie in memory (`PackedLinear.held`), and their bytes are looked at instead. When
a canary is computed, and what follows when it differs, is its caller's.

Tensor suffixes: M rows of one call, I input width.
"""

import hashlib

import torch
from torch import Tensor

from model.tensor_checksum import tensor_checksum

_ROW_BYTES = 256
NUM_ROWS = 4
"""A call of four rows takes hardly longer than one: the weights have to be read anyway."""


def canary_rows(width: int, device: torch.device) -> Tensor:
    """x_MI of 1 and -1: the same on every call and every machine."""
    generator = torch.Generator().manual_seed(width)
    return (torch.randint(0, 2, (NUM_ROWS, width), generator=generator) * 2 - 1).to(device, torch.float32)


class Digest:
    """Of answers and of weights, in the order in which they are added."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def answers(self, y_MO: Tensor) -> None:
        """Every bit of a few rows."""
        self._sha256.update(y_MO.detach().to("cpu").contiguous().view(torch.uint8).numpy().data)

    def weights(self, held: Tensor) -> None:
        """Every bit of a large tensor, at the speed of memory."""
        found = tensor_checksum(held) if held.device.type == "cpu" else word_sums(held)
        self._sha256.update(found.to_bytes(16, "little"))

    def value(self) -> bytes:
        return self._sha256.digest()


def word_sums(held: Tensor) -> int:
    """What stands for a checksum on devices: sums of all bytes, plain and by their place, in torch's integers.

    They wrap around and do not depend on the order of addition; any flipped bit changes the first.
    """
    words = held.contiguous().view(-1).view(torch.uint8)
    plain = words.sum(dtype=torch.int64)
    rows = words[: len(words) // _ROW_BYTES * _ROW_BYTES].view(-1, _ROW_BYTES).sum(1, dtype=torch.int64)
    placed = (rows * torch.arange(1, len(rows) + 1, device=held.device)).sum()
    return int(plain) & (2**64 - 1) | (int(placed) & (2**64 - 1)) << 64
