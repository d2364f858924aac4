"""The fp32 kernel: loses nothing, runs anywhere, and is what the others fall back to.

Tensor suffixes: M rows of one call, I and O input and output width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.packed.base import Kernel, PackedLinear, joined


@dataclass(frozen=True, slots=True, eq=False)
class Fp32Linear:
    """The weight in fp32, stored transposed: in this layout one or two rows is the only odd numeric class."""

    weight_IO: Tensor
    kernel: str = "fp32"

    @property
    def weight_bytes(self) -> int:
        return self.weight_IO.nbytes

    @property
    def out_features(self) -> int:
        return self.weight_IO.shape[1]

    @property
    def in_features(self) -> int:
        return self.weight_IO.shape[0]

    @property
    def held(self) -> tuple[Tensor, ...]:
        return (self.weight_IO,)

    def __call__(self, x_MI: Tensor) -> Tensor:
        return torch.mm(x_MI, self.weight_IO)


def pack_fp32(parts: Iterable[Tensor]) -> PackedLinear:
    """Transpose into memory of its own."""
    return Fp32Linear(joined(parts).to(torch.float32).t().contiguous())


FP32 = Kernel("fp32", ("cpu", "cuda"), 1e-5, pack_fp32)
