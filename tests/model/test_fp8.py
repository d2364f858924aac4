"""fp8: its arithmetic, on a CPU, and where it may be used."""

import pytest
import torch

from model.kernels import KERNELS, check_kernel
from model.numerics import same_bits
from model.packed.fp8 import has_fp8_arithmetic, scaled_e4m3


def rows_of(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_it_passes_the_self_test_and_its_stated_error() -> None:
    check_kernel(KERNELS["fp8"])
    weight_OI, x_MI = rows_of(256, 512, 1) * 0.04, rows_of(33, 512, 2)
    packed = KERNELS["fp8"].pack(weight_OI.clone())
    assert (packed.kernel, packed.weight_bytes) == ("fp8", 256 * 512 + 256 * 4)
    expected_MO = x_MI.double() @ weight_OI.double().t()
    assert float((packed(x_MI) - expected_MO).norm() / expected_MO.norm()) < 0.05


def test_a_row_is_scaled_by_itself_alone() -> None:
    packed = KERNELS["fp8"].pack(rows_of(32, 64, 3))
    x_MI = rows_of(4, 64, 4)
    alone_MO = packed(x_MI)
    x_MI[0] *= 1000
    assert same_bits(packed(x_MI)[1:], alone_MO[1:])


def test_the_largest_element_becomes_the_largest_number_and_zero_stays() -> None:
    x_MI = torch.tensor([[1.0, -3.0, 0.5], [0.0, 0.0, 0.0]])
    row_MI, scale_M1 = scaled_e4m3(x_MI)
    assert row_MI.float()[0, 1] == -448
    assert not row_MI.float()[1].any()
    torch.testing.assert_close(row_MI.float() * scale_M1, x_MI, rtol=0.07, atol=0)


def test_widths_that_are_no_multiples_of_sixteen_are_held_in_bf16() -> None:
    if not KERNELS["bf16"].usable(torch.device("cpu")):
        pytest.skip("this CPU has no bf16 arithmetic")
    assert KERNELS["fp8"].pack(rows_of(32, 72, 5)).kernel == "bf16"


@pytest.mark.parametrize(
    ("capability", "usable"), [((7, 5), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)]
)
def test_it_needs_ada_or_newer(capability: tuple[int, int], usable: bool) -> None:
    assert has_fp8_arithmetic(torch.device("cuda"), capability) is usable


def test_without_a_gpu_it_cannot_be_used() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert not KERNELS["fp8"].usable(torch.device("cuda"))
