"""The int8 kernel for CPUs: a quarter of fp32's bytes, integer sums, for experts where speed matters more.

Weights are rounded to 8 bits per output, rows to 8 bits (7 where the processor has no wide integer products)
per row: a row's scale is its own, so that its result does not depend on its neighbours, as it would with torch's
dynamic quantisation, which shares one scale among a batch. Sums are integers and exact.

The relative error (root mean square) of a product of normal weights and rows is 1.1e-2, with 7-bit rows 1.8e-2. Real
rows have outliers: on English text an expert of the demo model is off by 3e-2 to 6e-2, most of it from rounding rows,
and the model's next-token distribution by a KL divergence of 2e-2.

Tensor suffixes: M rows of one call, I and O input and output width.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from model.packed.base import Kernel, KernelError, PackedLinear

WEIGHT_LEVEL = 127
_SMALLEST_SCALE = 2.0**-120  # of an all-zero row or weight, instead of dividing by zero

Multiply = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Int8Linear:
    """A weight in a library's int8 layout.

    `multiply` maps fp32 rows of whole numbers within ±`level` to exact sums times the weight's scales, in
    fp32. Rows with NaN give NaN, and rows with infinities nothing finite.
    """

    multiply: Multiply
    level: int
    out_features: int
    in_features: int
    kernel: str = "int8"

    @property
    def weight_bytes(self) -> int:
        return self.out_features * (self.in_features + 4)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Nothing: sums of integers are exact, and show every bit."""
        return ()

    def __call__(self, x_MI: Tensor) -> Tensor:
        scale_M1 = torch.linalg.vector_norm(x_MI, torch.inf, 1, True)
        scale_M1.mul_(1.0 / self.level).clamp_min_(_SMALLEST_SCALE)
        return self.multiply(torch.div(x_MI, scale_M1).round_()).mul_(scale_M1)


@dataclass(frozen=True, slots=True)
class Int8Engine:
    """A library's product of 8-bit integers. `prepare(weight_OI int8, scale_O)` packs a weight for it."""

    name: str
    level: int
    prepare: Callable[[Tensor, Tensor], Multiply]


def _onednn(weight_OI: Tensor, scale_O: Tensor) -> Multiply:
    packed = torch.ops.onednn.qlinear_prepack(weight_OI, None)
    zero_O = torch.zeros(len(scale_O), dtype=torch.int64)
    linear = torch.ops.onednn.qlinear_pointwise.default

    def multiply(whole_MI: Tensor) -> Tensor:
        rows_MI = whole_MI.to(torch.int8)
        out: Tensor = linear(rows_MI, 1.0, 0, packed, scale_O, zero_O, None, 1.0, 0, torch.float32, "none", [], "")
        return out

    return multiply


def _fbgemm(weight_OI: Tensor, scale_O: Tensor, *, level: int) -> Multiply:
    zero_O = torch.zeros(len(scale_O), dtype=torch.int64)
    with _quantized_engine("fbgemm"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")  # deprecated, not replaced
        weight_OI = torch._make_per_channel_quantized_tensor(weight_OI, scale_O.double(), zero_O, 0)
        packed = torch.ops.quantized.linear_prepack(weight_OI, None)
    linear = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def multiply(whole_MI: Tensor) -> Tensor:
        out: Tensor = linear(whole_MI, 1.0, level + 1, packed)
        return out

    return multiply


@contextmanager
def _quantized_engine(name: str) -> Iterator[None]:
    """Packing goes by a global of torch's, which is put back."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


ONEDNN = Int8Engine("onednn8", 127, _onednn)
FBGEMM = Int8Engine("fbgemm8", 127, functools.partial(_fbgemm, level=127))
FBGEMM_7_BIT = Int8Engine("fbgemm7", 63, functools.partial(_fbgemm, level=63))


def _engines() -> Iterator[Int8Engine]:
    """In order of preference: with AMX oneDNN is the faster from 4 rows on, elsewhere FBGEMM is at any count.

    Without wide integer products (VNNI), sums of two 8-bit products saturate at 16 bits; with 7-bit rows they
    fit.
    """
    if torch._C._has_mkldnn and torch.cpu._is_amx_tile_supported():
        yield ONEDNN
    if "fbgemm" in torch.backends.quantized.supported_engines:
        yield FBGEMM
        yield FBGEMM_7_BIT


def is_exact(engine: Int8Engine) -> bool:
    """Whether the engine's integer sums are right here, at the ends of the range too, where they might saturate."""
    generator = torch.Generator().manual_seed(2)
    weight_OI = torch.randint(-WEIGHT_LEVEL, WEIGHT_LEVEL + 1, (35, 150), generator=generator)
    x_MI = torch.randint(-engine.level, engine.level + 1, (19, 150), generator=generator)
    weight_OI[:2], x_MI[:2], x_MI[2:4] = WEIGHT_LEVEL, engine.level, -engine.level
    weight_OI[1] *= -1
    multiply = engine.prepare(weight_OI.to(torch.int8), torch.ones(35))
    return all(
        torch.equal(multiply(rows.float()), (rows @ weight_OI.t()).float()) for rows in (x_MI, x_MI[:1], x_MI[2:5])
    )


@functools.cache
def int8_engine() -> Int8Engine:
    """The first engine that is exact on this machine. Raises KernelError where there is none."""
    found = next((engine for engine in _engines() if is_exact(engine)), None)
    if found is None:
        raise KernelError("kernel 'int8' has no exact integer product on this machine")
    return found


def pack_int8(parts: Iterable[Tensor]) -> PackedLinear:
    """Round every output's weights to 8 bits, by a scale of their own. Raises KernelError where one is not finite."""
    return pack_with(int8_engine(), parts)


def pack_with(engine: Int8Engine, parts: Iterable[Tensor]) -> PackedLinear:
    """`pack_int8` for an engine of one's choice."""
    rounded = list(map(_rounded, parts))  # `map` lets go of a part before it asks for the next
    weight_OI, scale_O = (torch.cat(tensors) for tensors in zip(*rounded, strict=True))
    del rounded
    out_features, in_features = weight_OI.shape
    return Int8Linear(engine.prepare(weight_OI, scale_O), engine.level, out_features, in_features)


def _rounded(part_OI: Tensor) -> tuple[Tensor, Tensor]:
    """A part as whole numbers within ±127, and the scale of each output."""
    part_OI = part_OI.to(torch.float32)
    scale_O = torch.linalg.vector_norm(part_OI, torch.inf, 1)
    if not bool(torch.isfinite(scale_O).all()):
        raise KernelError("kernel 'int8' cannot hold a weight that is not finite; fp32 can")
    scale_O.div_(WEIGHT_LEVEL).clamp_min_(_SMALLEST_SCALE)
    return part_OI.div_(scale_O[:, None]).round_().to(torch.int8), scale_O


def _arithmetic() -> str:
    return f"int8/{int8_engine().name}"


def _runs_on(_device: torch.device) -> bool:
    return next(_engines(), None) is not None


INT8 = Kernel("int8", ("cpu",), 3e-2, pack_int8, fuses=True, runs_on=_runs_on, arithmetic=_arithmetic)
