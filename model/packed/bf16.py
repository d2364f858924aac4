"""The bf16 kernel: weights and rows rounded to 8 significant bits, sums in fp32; on CPUs results rounded to bf16, too.

On CUDA it is the kernel of choice. On CPUs it is for those with bf16 arithmetic (AMX or AVX512-BF16): there a
large batch takes a third of fp16's time or less. The relative error of an expert is 5e-3, which a comparison in
fp32 would not forgive: never a default on CPUs.

Tensor suffixes: M rows of one call, I and O input and output width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.packed.base import Kernel, PackedLinear, joined

_TO_FP32 = getattr(torch.ops.aten.mm, "dtype", None)  # since torch 2.8, for CUDA: the sums as they are
_ROWS_HINT = 1  # oneDNN picks its layout for so many rows; in this one all row counts give the same bits


@dataclass(frozen=True, slots=True, eq=False)
class Bf16Linear:
    """The weight in bf16, plain torch, for CUDA."""

    weight_OI: Tensor
    kernel: str = "bf16"

    @property
    def weight_bytes(self) -> int:
        return self.weight_OI.nbytes

    @property
    def out_features(self) -> int:
        return self.weight_OI.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight_OI.shape[1]

    @property
    def held(self) -> tuple[Tensor, ...]:
        return (self.weight_OI,)

    def __call__(self, x_MI: Tensor) -> Tensor:
        rows_MI = x_MI.to(torch.bfloat16)
        if _TO_FP32 is None or not x_MI.is_cuda:
            return torch.nn.functional.linear(rows_MI, self.weight_OI).to(torch.float32)
        out_MO: Tensor = _TO_FP32(rows_MI, self.weight_OI.t(), torch.float32)
        return out_MO


@dataclass(frozen=True, slots=True, eq=False)
class Bf16PackedLinear:
    """The weight in oneDNN's own bf16 layout, for CPUs: 0.6 to 0.8 of the time of a plain one."""

    packed: Tensor
    out_features: int
    in_features: int
    kernel: str = "bf16"

    @property
    def weight_bytes(self) -> int:
        return 2 * self.out_features * self.in_features

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Back in the plain layout: results rounded to bf16 would hide most of a flipped bit."""
        return (self.packed.to_dense(),)

    def __call__(self, x_MI: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x_MI.to(torch.bfloat16), self.packed, None, "none", [], ""
        )
        return out.to(torch.float32)


def pack_bf16(parts: Iterable[Tensor]) -> PackedLinear:
    """Round to nearest; on CPU into oneDNN's layout as well."""
    weight_OI = joined(map(_rounded, parts))  # `map` lets go of a part before it asks for the next
    if weight_OI.device.type != "cpu":
        return Bf16Linear(weight_OI)
    out_features, in_features = weight_OI.shape
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _ROWS_HINT)
    return Bf16PackedLinear(packed, out_features, in_features)


def _rounded(part_OI: Tensor) -> Tensor:
    return part_OI.to(torch.bfloat16)


def has_bf16_arithmetic(device: torch.device) -> bool:
    """Any GPU that serves at all; of CPUs those that multiply bf16 without widening it first."""
    if device.type != "cpu":
        return True
    if not (torch._C._has_mkldnn and torch.cpu._is_avx512_bf16_supported()):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # which obeys ONEDNN_MAX_CPU_ISA


BF16 = Kernel("bf16", ("cuda", "cpu"), 2e-2, pack_bf16, fuses=True, runs_on=has_bf16_arithmetic)
