"""int8: exact integer sums, rows that do not know of each other, and an error that is as stated."""

import pytest
import torch
from torch import Tensor

from model.kernels import KERNELS, KernelError
from model.numerics import same_bits
from model.packed.int8 import FBGEMM, FBGEMM_7_BIT, ONEDNN, Int8Engine, Int8Linear, int8_engine, is_exact, pack_with

ENGINES = [engine for engine in (ONEDNN, FBGEMM, FBGEMM_7_BIT) if is_exact(engine)]


def rows_of(count: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def integer_reference(weight_OI: Tensor, x_MI: Tensor, level: int) -> Tensor:
    """The same rounding, spelled differently: with integer sums by torch itself."""
    scale_O = weight_OI.abs().amax(1) / 127
    whole_OI = torch.round(weight_OI / scale_O[:, None]).long()
    scale_M1 = x_MI.abs().amax(1, keepdim=True) * (1.0 / level)
    whole_MI = torch.round(x_MI / scale_M1).long()
    return (whole_MI @ whole_OI.t()).float() * scale_O * scale_M1


def test_an_engine_is_found_and_the_seven_bit_one_is_exact_on_any_x86() -> None:
    assert int8_engine() in ENGINES
    if "fbgemm" in torch.backends.quantized.supported_engines:
        assert FBGEMM_7_BIT in ENGINES


def test_an_engine_whose_sums_saturate_is_found_out() -> None:
    def saturating(weight_OI: Tensor, scale_O: Tensor) -> object:
        exact = ENGINES[0].prepare(weight_OI, scale_O)
        return lambda whole_MI: exact(whole_MI).clamp(-(2.0**21), 2.0**21)

    assert not is_exact(Int8Engine("saturating", 127, saturating))  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("shape", [(83, 71), (64, 512), (31, 2000)])
def test_products_are_those_of_exact_integers(engine: Int8Engine, shape: tuple[int, int]) -> None:
    weight_OI, x_MI = rows_of(*shape, seed=2) * 0.1, rows_of(19, shape[1], seed=3) * 5
    packed = pack_with(engine, [weight_OI.clone()])
    expected_MO = integer_reference(weight_OI, x_MI, engine.level)
    torch.testing.assert_close(packed(x_MI), expected_MO, rtol=1e-6, atol=1e-6)


def test_engines_of_eight_bits_agree_in_every_bit() -> None:
    weight_OI, x_MI = rows_of(96, 160, seed=4), rows_of(9, 160, seed=5)
    answers = [pack_with(engine, [weight_OI.clone()])(x_MI) for engine in ENGINES if engine.level == 127]
    assert all(same_bits(answer, answers[0]) for answer in answers)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_a_row_is_scaled_by_itself_alone(engine: Int8Engine) -> None:
    packed = pack_with(engine, [rows_of(48, 64, seed=6)])
    x_MI = rows_of(21, 64, seed=7)
    alone = torch.cat([packed(row[None]) for row in x_MI])
    x_MI[3:5] *= 1e4
    together = packed(x_MI)
    others = [row for row in range(21) if row not in (3, 4)]
    assert same_bits(together[others], alone[others])


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_the_error_is_as_stated(engine: Int8Engine) -> None:
    weight_OI, x_MI = rows_of(512, 576, seed=8) * 0.04, rows_of(64, 576, seed=9)
    packed = pack_with(engine, [weight_OI.clone()])
    error = relative_error(packed(x_MI), x_MI.double() @ weight_OI.double().t())
    assert error < (0.012 if engine.level == 127 else 0.02)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_rows_that_are_not_finite_spoil_themselves_only(engine: Int8Engine) -> None:
    packed = pack_with(engine, [rows_of(40, 64, seed=10)])
    x_MI = rows_of(6, 64, seed=11)
    clean_MO = packed(x_MI)
    x_MI[1, 5], x_MI[2, 6], x_MI[3] = torch.nan, torch.inf, 0.0
    out_MO = packed(x_MI)
    assert out_MO[1].isnan().all()
    assert not out_MO[2].isfinite().any()
    assert not out_MO[3].any()
    assert same_bits(out_MO[4:], clean_MO[4:])


def test_outputs_without_weights_are_zero_and_tiny_rows_are_kept() -> None:
    weight_OI = rows_of(8, 32, seed=12)
    weight_OI[3] = 0
    packed = KERNELS["int8"].pack(weight_OI.clone())
    x_MI = rows_of(5, 32, seed=13) * 1e-30
    assert not packed(x_MI)[:, 3].any()
    assert relative_error(packed(x_MI), x_MI.double() @ weight_OI.double().t()) < 0.03


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight_OI = rows_of(8, 32)
    weight_OI[7, 31] = value
    with pytest.raises(KernelError, match="not finite"):
        KERNELS["int8"].pack(weight_OI)


def test_it_holds_a_byte_an_element_and_a_scale_an_output() -> None:
    packed = KERNELS["int8"].pack(rows_of(40, 64))
    assert isinstance(packed, Int8Linear)
    assert (packed.kernel, packed.out_features, packed.in_features) == ("int8", 40, 64)
    assert packed.weight_bytes == 40 * 64 + 40 * 4


def test_packing_leaves_torchs_engine_as_it_was() -> None:
    before = torch.backends.quantized.engine
    KERNELS["int8"].pack(rows_of(8, 32))
    assert torch.backends.quantized.engine == before
