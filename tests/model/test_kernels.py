"""Every kernel computes the product it is asked for; fp16 packing happens only where it loses nothing."""

import pytest
import torch
from torch import Tensor

from model.kernels import (
    KERNELS,
    Fp16PackedLinear,
    Kernel,
    KernelError,
    PackedLinear,
    check_exp,
    check_kernel,
    default_kernel,
    fits_fp16,
    get_kernel,
    numerics_domain,
    self_test,
)


def weight(rows: int = 40, width: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, width, generator=generator).mul_(0.1).to(dtype).to(torch.float32)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_kernel_passes_its_own_test_on_cpu(name: str) -> None:
    self_test(name)


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_products_agree_with_fp64(name: str) -> None:
    weight_OI = weight(dtype=torch.float16)
    x_MI = torch.randn(9, 24, generator=torch.Generator().manual_seed(6))
    packed = KERNELS[name].pack(weight_OI.clone())
    expected_MO = x_MI.double() @ weight_OI.double().t()
    torch.testing.assert_close(packed(x_MI).double(), expected_MO, rtol=0, atol=2e-6)
    assert (packed.kernel, packed.in_features, packed.out_features) == (name, 24, 40)
    assert packed.weight_bytes == 40 * 24 * (4 if name == "fp32" else 2)


def test_bf16_rounds_inputs_and_weights() -> None:
    weight_OI, x_MI = weight(dtype=torch.bfloat16), torch.randn(3, 24)
    packed = KERNELS["bf16"].pack(weight_OI)
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


def test_all_zero_weights_are_packed() -> None:
    packed = KERNELS["fp16"].pack(torch.zeros(8, 8))
    assert packed.kernel == "fp16"
    assert not packed(torch.randn(2, 8)).any()


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


@pytest.mark.parametrize(("name", "device"), [("int3", "cpu"), ("fp16", "cuda")])
def test_an_unusable_kernel_is_refused_by_name(name: str, device: str) -> None:
    with pytest.raises(KernelError, match=f"'{name}' is not available on {device}; choose one of fp32"):
        get_kernel(name, device)


def test_a_kernel_that_computes_wrongly_is_caught() -> None:
    def bent(weight_OI: Tensor) -> PackedLinear:
        return KERNELS["fp32"].pack(weight_OI * 1.001)

    with pytest.raises(KernelError, match="'fp32' is off by"):
        check_kernel(Kernel("fp32", ("cpu",), 1e-5, bent))


def test_a_kernel_that_gives_no_number_is_caught() -> None:
    def broken(weight_OI: Tensor) -> PackedLinear:
        return KERNELS["fp32"].pack(weight_OI * torch.nan)

    with pytest.raises(KernelError, match="'fp32' is off by nan"):
        check_kernel(Kernel("fp32", ("cpu",), 1e-5, broken))


def test_a_kernel_that_falls_back_without_need_is_caught() -> None:
    with pytest.raises(KernelError, match="'fp16' refused a weight"):
        check_kernel(Kernel("fp16", ("cpu",), 1e-5, KERNELS["fp32"].pack))


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
