"""Which kernel a checkpoint's weights take, by name alone: whoever only plans a cluster needs no torch for it.

What the kernels are, and whether one can be used in this process, is `model.kernels`' knowledge.
"""

import functools
import platform
from pathlib import Path

from model.storage.stored_dtype import StoredDtype

ROUNDING = ("bf16", "int8", "fp8")
"""Kernels that round are for the experts, where nearly all weights are.

Rounding the router would choose other experts, and the head other tokens, to save a tenth of the bytes: the backbone
keeps what loses nothing.
"""

_HALF = (StoredDtype.F16, StoredDtype.BF16)


def lossless_kernel(dtype: StoredDtype, device_type: str, *, packs_half: bool) -> str:
    """The kernel that loses nothing of a checkpoint's weights, or bf16 on CUDA."""
    if device_type == "cuda":
        return "bf16"
    return "fp16" if dtype in _HALF and packs_half else "fp32"


@functools.cache
def cpu_packs_half() -> bool:
    """Whether processes on this machine's processor can hold weights as fp16, by FBGEMM.

    They can on x86 with AVX2 and FMA, for which torch is built with it. About any other machine torch itself is asked.
    """
    if platform.machine() == "x86_64" and {"avx2", "fma"} <= _cpu_flags():
        return True
    import torch

    return "fbgemm" in torch.backends.quantized.supported_engines


def _cpu_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
