"""How one weight matrix is held in memory and multiplied: a small registry of kernels, tested at start.

Every kernel takes fp32 rows and returns fp32 rows. Which row counts may be used together is found by
`model.numerics`; which tensors are packed, and when, is left to the layers that own them.

Tensor suffixes: M rows of one call, I and O input and output width.
"""

import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

_CHECK_ELEMENTS = 1 << 18  # representability is checked in slices, so that the check costs no second tensor


class KernelError(RuntimeError):
    """A kernel that cannot be used here, or that computes wrong numbers on this machine."""


class PackedLinear(Protocol):
    """A weight matrix in a kernel's own layout. Calling it maps fp32 x_MI to fp32 x_MO."""

    @property
    def kernel(self) -> str:
        """The kernel in use, which differs from the one asked for when the weight did not fit it."""

    @property
    def weight_bytes(self) -> int:
        """Bytes held by the packed weight."""

    @property
    def out_features(self) -> int:
        """O."""

    @property
    def in_features(self) -> int:
        """I."""

    def __call__(self, x_MI: Tensor) -> Tensor:
        """x_MO = x_MI times the transposed weight."""


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

    def __call__(self, x_MI: Tensor) -> Tensor:
        return torch.mm(x_MI, self.weight_IO)


@dataclass(frozen=True, slots=True, eq=False)
class Fp16PackedLinear:
    """FBGEMM's packed fp16 weight: half the bytes of fp32, widened in registers, accumulated in fp32.

    `packed` holds the weight times a power of two, of which `unscale` is the inverse: both are exact.
    """

    packed: Any
    out_features: int
    in_features: int
    unscale: float = 1.0
    kernel: str = "fp16"

    @property
    def weight_bytes(self) -> int:
        return 2 * self.out_features * self.in_features

    def __call__(self, x_MI: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x_MI, self.packed)
        return out if self.unscale == 1.0 else out.mul_(self.unscale)


@dataclass(frozen=True, slots=True, eq=False)
class Bf16Linear:
    """The weight in bf16, plain torch, for CUDA; the test suite has run it on CPU only."""

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

    def __call__(self, x_MI: Tensor) -> Tensor:
        return torch.nn.functional.linear(x_MI.to(torch.bfloat16), self.weight_OI).to(torch.float32)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One entry of the registry. `tolerance` bounds the self-test's error relative to the largest output.

    `pack` may overwrite the weight it is given: packing must not need a second fp32 tensor.
    """

    name: str
    device_types: tuple[str, ...]
    tolerance: float
    pack: Callable[[Tensor], PackedLinear]


def _pack_fp32(weight_OI: Tensor) -> PackedLinear:
    return Fp32Linear(weight_OI.to(torch.float32).t().contiguous())


def _pack_fp16(weight_OI: Tensor) -> PackedLinear:
    """Pack when every weight, times a common power of two, is exactly an fp16 number; else keep fp32.

    The power of two is for bf16 weights, whose smallest values lie below fp16's range while the largest
    leave its upper half unused.
    """
    weight_OI = weight_OI.to(torch.float32)
    scale = next((scale for scale in (1.0, _largest_scale(weight_OI)) if fits_fp16(weight_OI, scale)), None)
    if scale is None:
        return _pack_fp32(weight_OI)
    out_features, in_features = weight_OI.shape
    packed = torch.ops.quantized.linear_prepack_fp16(weight_OI.mul_(scale), None)
    return Fp16PackedLinear(packed, out_features, in_features, 1.0 / scale)


def _largest_scale(weight_OI: Tensor) -> float:
    """The power of two that brings the largest weight just under 2**15 (fp16 ends a little under 2**16)."""
    low, high = torch.aminmax(weight_OI)
    largest = max(-float(low), float(high))
    return 2.0 ** (15 - math.frexp(largest)[1]) if 0.0 < largest < math.inf else 1.0


def _pack_bf16(weight_OI: Tensor) -> PackedLinear:
    return Bf16Linear(weight_OI.to(torch.bfloat16))


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        "fp32": Kernel("fp32", ("cpu", "cuda"), 1e-5, _pack_fp32),
        "fp16": Kernel("fp16", ("cpu",), 1e-5, _pack_fp16),
        "bf16": Kernel("bf16", ("cuda", "cpu"), 2e-2, _pack_bf16),
    }
)


def fits_fp16(weight_OI: Tensor, scale: float = 1.0) -> bool:
    """Whether every element times `scale` is exactly a finite fp16 number. Takes a few MiB beside the weight."""
    flat = weight_OI.reshape(-1)
    for start in range(0, flat.numel(), _CHECK_ELEMENTS):
        part = flat[start : start + _CHECK_ELEMENTS] * scale
        rounded = part.to(torch.float16)
        if not (torch.equal(rounded.to(part.dtype), part) and bool(torch.isfinite(rounded).all())):
            return False
    return True


def default_kernel(checkpoint_dtype: torch.dtype, device: torch.device | str) -> str:
    """The kernel that loses nothing of a checkpoint's weights, or bf16 on CUDA."""
    if torch.device(device).type == "cuda":
        return "bf16"
    half = checkpoint_dtype in (torch.float16, torch.bfloat16)
    return "fp16" if half and "fbgemm" in torch.backends.quantized.supported_engines else "fp32"


def get_kernel(name: str, device: torch.device | str = "cpu") -> Kernel:
    """The registry's entry, or a KernelError that names what may be asked for on this device."""
    kind = torch.device(device).type
    usable = [kernel.name for kernel in KERNELS.values() if kind in kernel.device_types]
    if name not in usable:
        raise KernelError(f"kernel {name!r} is not available on {kind}; choose one of {', '.join(usable)}")
    return KERNELS[name]


def self_test(name: str, device: torch.device | str = "cpu") -> None:
    """Check, before anything is served, that a kernel and `exp` compute here as they must; raises KernelError."""
    check_exp(device)
    check_kernel(get_kernel(name, device), device)


@torch.no_grad()
def check_kernel(kernel: Kernel, device: torch.device | str = "cpu") -> None:
    """Multiply a small random problem and compare with fp64.

    The weights hold fp16 subnormals and the largest fp16 number too, and the shape is no multiple of any
    tile.
    """
    generator = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(83, 71, generator=generator).to(torch.float16)
    weight_OI[:5] *= 2.0**-18
    weight_OI[5, 5] = 65504.0
    x_MI = torch.randn(19, 71, generator=generator)
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
    """The house builds its nonlinearities on exp alone: a number's place in a buffer must not change it."""
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
