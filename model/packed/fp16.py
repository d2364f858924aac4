"""The fp16 kernel for CPUs: FBGEMM's packed half-precision weights, fp32 rows and fp32 sums.

It loses nothing where every weight is an fp16 number, which is checked while packing.

Tensor suffixes: M rows of one call, I and O input and output width.
"""

import functools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.packed.base import Kernel, PackedLinear, joined
from model.packed.fp32 import pack_fp32

WIDE_ELEMENTS = 1 << 23
"""From so many elements on a weight is worth the few microseconds that sharing a product among threads costs."""

_CHECK_ELEMENTS = 1 << 16  # representability is checked in slices that a cache holds, without a second tensor


@dataclass(frozen=True, slots=True, eq=False)
class Fp16PackedLinear:
    """FBGEMM's packed fp16 weight: half the bytes of fp32, widened in registers, accumulated in fp32.

    `packed` holds the weight times a power of two, of which `unscale` is the inverse: both are exact.
    """

    packed: Tensor
    out_features: int
    in_features: int
    unscale: float = 1.0
    kernel: str = "fp16"

    @property
    def weight_bytes(self) -> int:
        return 2 * self.out_features * self.in_features

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Nothing: FBGEMM hides its layout, and in fp32 a sum of fp16 numbers shows every bit."""
        return ()

    def __call__(self, x_MI: Tensor) -> Tensor:
        out = torch.fbgemm_linear_fp16_weight_fp32_activation(x_MI, self.packed, None)
        return out if self.unscale == 1.0 else out.mul_(self.unscale)


@dataclass(frozen=True, slots=True, eq=False)
class Fp16WideLinear:
    """The same product in the same bits, by as many of torch's threads as there are: each has some of the outputs.

    `packed` is the class behind torch's quantized linear; passing it takes 6 µs a call more, and waking threads 20.
    """

    packed: torch.ScriptObject
    out_features: int
    in_features: int
    unscale: float = 1.0
    kernel: str = "fp16"

    @property
    def weight_bytes(self) -> int:
        return 2 * self.out_features * self.in_features

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Nothing, as above."""
        return ()

    def __call__(self, x_MI: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(x_MI, self.packed)
        return out if self.unscale == 1.0 else out.mul_(self.unscale)


def pack_fp16(parts: Iterable[Tensor]) -> PackedLinear:
    """Pack when every weight, times a common power of two, is exactly an fp16 number; else keep fp32.

    The power of two is for bf16 weights, whose smallest values lie below fp16's range while the largest
    leave its upper half unused.
    """
    weight_OI = joined(parts).to(torch.float32)
    scale = _scale_that_fits(weight_OI)
    if scale is None:
        return pack_fp32([weight_OI])
    _accept_deprecation()
    out_features, in_features = weight_OI.shape
    if scale != 1.0:
        weight_OI.mul_(scale)
    if weight_OI.numel() >= WIDE_ELEMENTS:
        wide = torch.ops.quantized.linear_prepack_fp16(weight_OI, None)
        return Fp16WideLinear(wide, out_features, in_features, 1.0 / scale)
    packed = torch.fbgemm_pack_gemm_matrix_fp16(weight_OI)
    return Fp16PackedLinear(packed, out_features, in_features, 1.0 / scale)


def fits_fp16(weight_OI: Tensor, scale: float = 1.0) -> bool:
    """Whether every element times `scale` is exactly a finite fp16 number. Takes a few MiB beside the weight."""
    flat = weight_OI.reshape(-1)
    for start in range(0, flat.numel(), _CHECK_ELEMENTS):
        part = flat[start : start + _CHECK_ELEMENTS]
        if scale != 1.0:
            part = part * scale
        lost = part.to(torch.float16).to(part.dtype) - part  # NaN for NaN, and for infinity
        if torch.count_nonzero(lost):
            return False
    return True


def _scale_that_fits(weight_OI: Tensor) -> float | None:
    """1 where that does, else the power of two that brings the largest weight just under 2**15 (fp16 ends a little
    under 2**16); None where neither does.
    """
    if fits_fp16(weight_OI):
        return 1.0
    low, high = (float(bound) for bound in torch.aminmax(weight_OI))
    largest = max(-low, high)
    if not 0.0 < largest < math.inf:
        return None
    scale = 2.0 ** (15 - math.frexp(largest)[1])
    return scale if fits_fp16(weight_OI, scale) else None


@functools.cache
def _accept_deprecation() -> None:
    """Torch says once a process that these functions will go; tests make errors of warnings.

    `torch.ops.quantized.linear_prepack_fp16` and `linear_dynamic_fp16` are the same product, and what to use
    then: they take 13 µs a call more, for passing the packed weight.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fbgemm_")
        packed = torch.fbgemm_pack_gemm_matrix_fp16(torch.zeros(1, 1))
        torch.fbgemm_linear_fp16_weight_fp32_activation(torch.zeros(1, 1), packed, None)


def _runs_on(_device: torch.device) -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


FP16 = Kernel("fp16", ("cpu",), 1e-5, pack_fp16, runs_on=_runs_on)
