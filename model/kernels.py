"""The registry of kernels: which there are, and trying one before it serves.

A kernel is one way to hold a weight matrix and to multiply rows by it: `model.packed` has a file for each. Which row
counts may be used together is found by `model.numerics`.

Tensor suffixes: M rows of one call, I and O input and output width.
"""

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from model.kernel_choice import ROUNDING, lossless_kernel
from model.packed.base import Kernel, KernelError, PackedLinear
from model.packed.bf16 import BF16
from model.packed.fp8 import FP8
from model.packed.fp16 import FP16
from model.packed.fp32 import FP32
from model.packed.int8 import INT8
from model.storage.torch_dtypes import to_stored

__all__ = ["KERNELS", "Kernel", "KernelError", "PackedLinear"]

KERNELS: Mapping[str, Kernel] = MappingProxyType({kernel.name: kernel for kernel in (FP32, FP16, BF16, INT8, FP8)})


def default_kernel(checkpoint_dtype: torch.dtype, device: torch.device | str) -> str:
    """The kernel that loses nothing of a checkpoint's weights in this process, or bf16 on CUDA."""
    device = torch.device(device)
    return lossless_kernel(to_stored(checkpoint_dtype), device.type, packs_half=FP16.usable(device))


def backbone_kernel(kernel: str, checkpoint_dtype: torch.dtype, device: torch.device | str) -> str:
    """What attention, router and head use when `kernel` was asked for: none that rounds."""
    return default_kernel(checkpoint_dtype, device) if kernel in ROUNDING else kernel


def get_kernel(name: str, device: torch.device | str = "cpu") -> Kernel:
    """The registry's entry, or a KernelError that names what may be asked for on this device."""
    device = torch.device(device)
    usable = [kernel.name for kernel in KERNELS.values() if kernel.usable(device)]
    if name not in usable:
        raise KernelError(f"kernel {name!r} is not available on {device.type}; choose one of {', '.join(usable)}")
    return KERNELS[name]


def arithmetic(name: str) -> str:
    """What a kernel contributes to a numerics domain: its name, and what decides its bits beside."""
    described = KERNELS[name].arithmetic
    return name if described is None else described()


def self_test(name: str, device: torch.device | str = "cpu") -> None:
    """Check, before anything is served, that a kernel and `exp` compute here as they must; raises KernelError."""
    check_exp(device)
    if torch.device(device).type == "cuda":
        check_exp(device, torch.nn.functional.silu)
    check_kernel(get_kernel(name, device), device)


@torch.no_grad()
def check_kernel(kernel: Kernel, device: torch.device | str = "cpu") -> None:
    """Multiply a small random problem and compare with fp64.

    The weights hold fp16 subnormals and the largest fp16 number too, and the shape is no multiple of any
    tile, unless the kernel is for multiples only.
    """
    outputs, inputs = kernel.test_shape
    generator = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(outputs, inputs, generator=generator).to(torch.float16)
    weight_OI[:5] *= 2.0**-18
    weight_OI[5, 5] = 65504.0
    x_MI = torch.randn(19, inputs, generator=generator)
    if kernel.name == "bf16":
        weight_OI, x_MI = weight_OI.to(torch.bfloat16), x_MI.to(torch.bfloat16).to(torch.float32)
    expected_MO = x_MI.double() @ weight_OI.double().t()
    packed = kernel.pack(weight_OI.to(torch.float32).to(device))
    if packed.kernel != kernel.name:
        raise KernelError(f"kernel {kernel.name!r} refused a weight that it must hold exactly")
    error_MO = (packed(x_MI.to(device)).cpu().double() - expected_MO).abs()
    worst = float((error_MO / expected_MO.abs().amax(0)).max())
    if not worst <= kernel.tolerance:
        raise KernelError(f"kernel {kernel.name!r} is off by {worst:.1e} here; at most {kernel.tolerance:.0e}")


def check_exp(device: torch.device | str = "cpu", exp: Callable[[Tensor], Tensor] = torch.exp) -> None:
    """Nonlinearities are built on exp alone, on GPUs on silu: a number's place in a buffer must not change it."""
    x = torch.linspace(-80.0, 80.0, 1499, device=device)
    whole = exp(x)
    for start in range(1, 18):
        for count in (1, 3, 16, 37, 1000):
            part = slice(start, start + count)
            if not torch.equal(exp(x[part]), whole[part]):
                raise KernelError("exp rounds by position on this machine, so exact numbers cannot be kept")


def numerics_domain(device: torch.device | str, parts: Mapping[str, object]) -> str:
    """A name for everything that decides the bits of a result; equal names may stand in for each other.

    `parts` are the owner's own: kernels in use and row classes, by name. The torch build, the processor and
    the thread count are added here.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        hardware = torch.cuda.get_device_name(torch.device(device))
    else:
        hardware = f"{_cpu_vendor()}/{torch.backends.cpu.get_cpu_capability()}/{torch.get_num_threads()}threads"
    described = [f"{name}={value}" for name, value in sorted(parts.items())]
    return " ".join([f"torch={torch.__version__}", f"{kind}={hardware}", *described])


def _cpu_vendor() -> str:
    """The processor's maker: libraries choose code by it, not only by instruction set."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    return platform.machine()
