"""Every kernel computes the product it is asked for; fp16 packing happens only where it loses nothing."""

import math
import warnings
import weakref
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor

from model.kernels import (
    KERNELS,
    Kernel,
    KernelError,
    PackedLinear,
    arithmetic,
    backbone_kernel,
    check_exp,
    check_kernel,
    default_kernel,
    get_kernel,
    numerics_domain,
    self_test,
)
from model.packed.bf16 import Bf16Linear
from model.packed.fp16 import Fp16PackedLinear, Fp16WideLinear, fits_fp16
from model.packed.int8 import int8_engine


def weight(rows: int = 40, width: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, width, generator=generator).mul_(0.1).to(dtype).to(torch.float32)


CPU = torch.device("cpu")
ON_CPU = sorted(name for name, kernel in KERNELS.items() if kernel.usable(CPU))


@pytest.mark.parametrize("name", ON_CPU)
def test_every_kernel_of_this_cpu_passes_its_own_test(name: str) -> None:
    self_test(name)


def test_packing_and_multiplying_warn_of_nothing() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for name in ON_CPU:
            KERNELS[name].pack(weight())(torch.ones(2, 24))
    assert not seen


@pytest.mark.parametrize("name", ON_CPU)
def test_parts_are_packed_one_above_the_other(name: str) -> None:
    weight_OI = weight(48, 32, torch.float16)
    x_MI = torch.randn(7, 32, generator=torch.Generator().manual_seed(7))
    whole = KERNELS[name].pack(weight_OI.clone())
    parts = KERNELS[name].pack_parts(part.clone() for part in weight_OI.split([16, 32]))
    assert (parts.out_features, parts.in_features, parts.weight_bytes) == (48, 32, whole.weight_bytes)
    assert torch.equal(parts(x_MI), whole(x_MI))


@pytest.mark.parametrize("name", ["bf16", "int8", "fp8"])
def test_a_kernel_that_rounds_lets_go_of_a_part_before_it_asks_for_the_next(name: str) -> None:
    living: list[weakref.ref[Tensor]] = []

    def parts() -> Iterator[Tensor]:
        for _ in range(3):
            assert not any(part() is not None for part in living)
            part = weight(16, 32)
            living.append(weakref.ref(part))
            yield part
            del part

    if name in ON_CPU or name == "fp8":
        assert KERNELS[name].pack_parts(parts()).out_features == 48
    assert KERNELS[name].fuses


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_products_agree_with_fp64(name: str) -> None:
    weight_OI = weight(dtype=torch.float16)
    x_MI = torch.randn(9, 24, generator=torch.Generator().manual_seed(6))
    packed = KERNELS[name].pack(weight_OI.clone())
    expected_MO = x_MI.double() @ weight_OI.double().t()
    torch.testing.assert_close(packed(x_MI).double(), expected_MO, rtol=0, atol=2e-6)
    assert (packed.kernel, packed.in_features, packed.out_features) == (name, 24, 40)
    assert packed.weight_bytes == 40 * 24 * (4 if name == "fp32" else 2)


@pytest.mark.parametrize("packed_by_onednn", [False, True])
def test_bf16_rounds_inputs_and_weights(packed_by_onednn: bool) -> None:
    if packed_by_onednn and "bf16" not in ON_CPU:
        pytest.skip("this CPU has no bf16 arithmetic")
    weight_OI, x_MI = weight(dtype=torch.bfloat16), torch.randn(3, 24, generator=torch.Generator().manual_seed(8))
    packed = KERNELS["bf16"].pack(weight_OI) if packed_by_onednn else Bf16Linear(weight_OI.to(torch.bfloat16))
    assert (packed.kernel, packed.in_features, packed.out_features, packed.weight_bytes) == ("bf16", 24, 40, 1920)
    torch.testing.assert_close(packed(x_MI), x_MI @ weight_OI.t(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("value", [1 / 3, 2.0**-140, torch.inf, torch.nan])
def test_a_weight_that_fp16_cannot_hold_stays_in_fp32(value: float) -> None:
    weight_OI = weight(dtype=torch.float16)
    weight_OI[7, 3] = value
    packed = KERNELS["fp16"].pack(weight_OI.clone())
    assert packed.kernel == "fp32"
    x_MI = torch.eye(24)
    torch.testing.assert_close(packed(x_MI)[3, 7], weight_OI[7, 3], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [65504.0, -65504.0, 2.0**-24, -(2.0**-15), 0.0, -0.0])
def test_the_ends_of_fp16_are_held_exactly(value: float) -> None:
    weight_OI = weight(dtype=torch.float16)
    weight_OI[7, 3] = value
    packed = KERNELS["fp16"].pack(weight_OI.clone())
    assert packed.kernel == "fp16"
    assert torch.equal(packed(torch.eye(24)), weight_OI.t())


@pytest.mark.parametrize("smallest", [2.0**-26, -1.5 * 2.0**-30])
def test_small_bf16_weights_are_packed_by_a_power_of_two_without_loss(smallest: float) -> None:
    weight_OI = weight(dtype=torch.bfloat16)
    weight_OI[2, 2] = smallest
    assert not fits_fp16(weight_OI)
    packed = KERNELS["fp16"].pack(weight_OI.clone())
    assert isinstance(packed, Fp16PackedLinear)
    assert packed.unscale < 1
    assert torch.equal(packed(torch.eye(24)), weight_OI.t())


def test_a_wide_product_has_the_bits_of_the_narrow_one_whatever_the_threads() -> None:
    KERNELS["fp16"].pack(torch.zeros(8, 8))  # accepts torch's warning
    weight_OI = weight(10_007, 840, torch.float16)
    narrow = Fp16PackedLinear(torch.fbgemm_pack_gemm_matrix_fp16(weight_OI), 10_007, 840)
    wide = KERNELS["fp16"].pack(weight_OI)
    assert isinstance(wide, Fp16WideLinear)
    for name in ("kernel", "weight_bytes", "out_features", "in_features", "unscale", "held"):
        assert getattr(wide, name) == getattr(narrow, name)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for count in (1, 3, 16, 130):
                x_MI = torch.randn(count, 840, generator=torch.Generator().manual_seed(count))
                assert torch.equal(wide(x_MI), narrow(x_MI)), (threads, count)
    finally:
        torch.set_num_threads(before)


def test_small_wide_bf16_weights_are_packed_without_loss() -> None:
    weight_OI = weight(10_000, 840, torch.bfloat16)
    weight_OI[2, 2] = 2.0**-30
    wide = KERNELS["fp16"].pack(weight_OI.clone())
    assert isinstance(wide, Fp16WideLinear)
    assert wide.unscale < 1
    assert torch.equal(wide(torch.eye(840)), weight_OI.t())


def test_all_zero_weights_are_packed() -> None:
    packed = KERNELS["fp16"].pack(torch.zeros(8, 8))
    assert packed.kernel == "fp16"
    assert not packed(torch.randn(2, 8)).any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 65520.0])
def test_what_fp16_cannot_hold_at_any_scale_stays_as_it_is(value: float) -> None:
    weight_OI = weight(dtype=torch.float16)
    weight_OI[7, 3], weight_OI[2, 2] = value, 2.0**-30
    assert not fits_fp16(weight_OI)
    assert KERNELS["fp16"].pack(weight_OI.clone()).kernel == "fp32"


def test_the_last_weight_of_a_large_tensor_is_checked_too() -> None:
    weight_OI = weight(700, 800, dtype=torch.float16)
    assert fits_fp16(weight_OI)
    weight_OI[-1, -1] = 1 / 3
    assert not fits_fp16(weight_OI)


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        (torch.float16, "cpu", "fp16"),
        (torch.bfloat16, "cpu", "fp16"),
        (torch.float32, "cpu", "fp32"),
        (torch.float16, "cuda", "bf16"),
        (torch.float32, "cuda:1", "bf16"),
    ],
)
def test_the_checkpoint_chooses_the_kernel(dtype: torch.dtype, device: str, expected: str) -> None:
    assert default_kernel(dtype, device) == expected


@pytest.mark.parametrize(
    ("asked", "device", "expected"),
    [
        ("fp32", "cpu", "fp32"),
        ("fp16", "cpu", "fp16"),
        ("int8", "cpu", "fp16"),
        ("bf16", "cpu", "fp16"),
        ("fp8", "cpu", "fp16"),
        ("fp8", "cuda", "bf16"),
        ("int3", "cpu", "int3"),
        ("bf16", "cuda", "bf16"),
    ],
)
def test_kernels_that_round_are_for_experts_only(asked: str, device: str, expected: str) -> None:
    assert backbone_kernel(asked, torch.float16, device) == expected


@pytest.mark.parametrize(("name", "device"), [("int3", "cpu"), ("fp8", "cpu"), ("fp16", "cuda"), ("int8", "cuda")])
def test_an_unusable_kernel_is_refused_by_name(name: str, device: str) -> None:
    with pytest.raises(KernelError, match=f"'{name}' is not available on {device}; choose one of fp32"):
        get_kernel(name, device)


def test_a_kernel_that_computes_wrongly_is_caught() -> None:
    def bent(parts: Iterable[Tensor]) -> PackedLinear:
        return KERNELS["fp32"].pack_parts(part * 1.001 for part in parts)

    with pytest.raises(KernelError, match="'fp32' is off by"):
        check_kernel(Kernel("fp32", ("cpu",), 1e-5, bent))


def test_a_kernel_that_gives_no_number_is_caught() -> None:
    def broken(parts: Iterable[Tensor]) -> PackedLinear:
        return KERNELS["fp32"].pack_parts(part * torch.nan for part in parts)

    with pytest.raises(KernelError, match="'fp32' is off by nan"):
        check_kernel(Kernel("fp32", ("cpu",), 1e-5, broken))


def test_a_kernel_that_falls_back_without_need_is_caught() -> None:
    with pytest.raises(KernelError, match="'fp16' refused a weight"):
        check_kernel(Kernel("fp16", ("cpu",), 1e-5, KERNELS["fp32"].pack_parts))


def test_an_exp_that_rounds_by_position_is_caught() -> None:
    def tail_differs(x: Tensor) -> Tensor:
        out = torch.exp(x)
        out[len(x) // 8 * 8 :] *= 1.000001
        return out

    check_exp()
    with pytest.raises(KernelError, match="exp rounds by position"):
        check_exp(exp=tail_differs)


def test_a_numerics_domain_names_what_decides_the_bits() -> None:
    domain = numerics_domain("cpu", {"rows": "4.8", "kernel": "fp16"})
    assert f"torch={torch.__version__}" in domain
    assert torch.backends.cpu.get_cpu_capability() in domain
    assert f"{torch.get_num_threads()}threads" in domain
    assert domain.endswith("kernel=fp16 rows=4.8")
    assert domain == numerics_domain("cpu", {"kernel": "fp16", "rows": "4.8"})
    assert domain != numerics_domain("cpu", {"kernel": "fp16", "rows": "8"})


def test_the_domain_of_int8_names_its_engine() -> None:
    assert arithmetic("fp16") == "fp16"
    assert arithmetic("int8") == f"int8/{int8_engine().name}"
