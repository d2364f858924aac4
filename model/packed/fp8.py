"""The fp8 kernel for GPUs of compute capability 8.9 and up: e4m3 weights and rows, each with a scale of its own.

The relative error of a product is about 4e-2 (root mean square): e4m3 keeps 4 significant bits.

Tensor suffixes: M rows of one call, I and O input and output width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.packed.base import Kernel, PackedLinear
from model.packed.bf16 import pack_bf16

_MINIMUM_CAPABILITY = (8, 9)  # Ada and Hopper
_TILE = 16  # the library's products come in widths of this many
_LARGEST = 448.0  # of e4m3
_SMALLEST_SCALE = 2.0**-120


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Linear:
    """weight_OI in e4m3, with fp32 scales per output; a row gets its own scale when it comes."""

    weight_OI: Tensor
    scale_1O: Tensor
    kernel: str = "fp8"

    @property
    def weight_bytes(self) -> int:
        return self.weight_OI.nbytes + self.scale_1O.nbytes

    @property
    def out_features(self) -> int:
        return self.weight_OI.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight_OI.shape[1]

    @property
    def held(self) -> tuple[Tensor, ...]:
        return self.weight_OI, self.scale_1O

    def __call__(self, x_MI: Tensor) -> Tensor:
        row_MI, scale_M1 = scaled_e4m3(x_MI)
        weight_IO = self.weight_OI.t()
        out = torch._scaled_mm(row_MI, weight_IO, scale_M1, self.scale_1O, out_dtype=torch.bfloat16)
        return out.to(torch.float32)


def scaled_e4m3(x_MI: Tensor) -> tuple[Tensor, Tensor]:
    """Every row divided by a scale that brings its largest element to e4m3's largest; and scale_M1."""
    scale_M1 = torch.linalg.vector_norm(x_MI, torch.inf, 1, True).div_(_LARGEST).clamp_min_(_SMALLEST_SCALE)
    return (x_MI / scale_M1).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale_M1


def pack_fp8(parts: Iterable[Tensor]) -> PackedLinear:
    """A weight whose widths are no multiples of 16 is held in bf16 instead."""
    first, *more = map(_narrowed, parts)
    weight_OI = torch.cat([first[0], *(weight for weight, _ in more)])
    scale_O1 = torch.cat([first[1], *(scale for _, scale in more)])
    if any(width % _TILE for width in weight_OI.shape):
        return pack_bf16([weight_OI.to(torch.float32) * scale_O1])
    return Fp8Linear(weight_OI, scale_O1.t().contiguous())


def _narrowed(part_OI: Tensor) -> tuple[Tensor, Tensor]:
    return scaled_e4m3(part_OI.to(torch.float32))


def has_fp8_arithmetic(device: torch.device, capability: tuple[int, int] | None = None) -> bool:
    """Whether the GPU multiplies e4m3; `capability` stands in for the device's own."""
    if capability is None:
        if not torch.cuda.is_available():
            return False
        capability = torch.cuda.get_device_capability(device)
    return capability >= _MINIMUM_CAPABILITY


FP8 = Kernel("fp8", ("cuda",), 1e-1, pack_fp8, fuses=True, runs_on=has_fp8_arithmetic, test_shape=(96, 80))
