"""Row classes are found by experiment and obeyed; on functions made to misbehave in known ways."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.numerics import (
    CUDA_ROW_CANDIDATES,
    ROW_CANDIDATES,
    RowClass,
    bit_marks,
    calibrate_rows,
    map_rows,
    row_candidates,
    same_bits,
)


def doubled(x_MI: Tensor) -> Tensor:
    return x_MI * 2


def rounding_below(limit: int, x_MI: Tensor) -> Tensor:
    """Twice the row, off by one part in a million where the call has fewer rows than `limit`."""
    return x_MI * (2.000002 if len(x_MI) < limit else 2.0)


def test_a_uniform_function_may_use_every_row_count() -> None:
    assert calibrate_rows(doubled, 5).buckets == ROW_CANDIDATES


def test_counts_that_round_differently_are_never_mixed() -> None:
    found = calibrate_rows(lambda x: rounding_below(8, x), 5)
    assert found.buckets == tuple(rows for rows in ROW_CANDIDATES if rows >= 8)


def test_the_class_that_wastes_least_is_chosen() -> None:
    # 1..255 agree, and 256 and above agree: padding a single row to 256 would cost more than cutting 512 rows
    found = calibrate_rows(lambda x: rounding_below(256, x), 5)
    assert found.buckets == tuple(rows for rows in ROW_CANDIDATES if rows < 256)


def test_an_anchor_forces_its_own_class() -> None:
    found = calibrate_rows(lambda x: rounding_below(8, x), 5, anchor=1)
    assert found.buckets == tuple(rows for rows in ROW_CANDIDATES if rows < 8)


def test_counts_whose_answer_depends_on_the_position_are_dropped() -> None:
    def last_row_differs(x_MI: Tensor) -> Tensor:
        out = x_MI * 2
        if len(x_MI) > 4:
            out[-1] *= 1.000001
        return out

    assert calibrate_rows(last_row_differs, 5).buckets == (1, 2, 3, 4)


def test_a_single_bucket_remains_where_nothing_agrees() -> None:
    def every_position_differs(x_MI: Tensor) -> Tensor:
        return x_MI * (1 + 1e-6 * torch.arange(1, len(x_MI) + 1)[:, None])

    assert calibrate_rows(every_position_differs, 5).buckets == (1,)
    assert calibrate_rows(every_position_differs, 5, [3, 4]).buckets == (3,)


def test_calibration_needs_a_candidate() -> None:
    with pytest.raises(ValueError, match="at least one row count"):
        calibrate_rows(doubled, 5, [])


@pytest.mark.parametrize("buckets", [(), (0, 1), (2, 1), (1, 1)])
def test_a_row_class_refuses_what_is_not_ascending_and_positive(buckets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending positive"):
        RowClass(buckets)


@given(rows=st.integers(0, 2000), buckets=st.sets(st.integers(1, 600), min_size=1).map(lambda s: tuple(sorted(s))))
def test_pieces_cover_all_rows_once_and_fit_their_buckets(rows: int, buckets: tuple[int, ...]) -> None:
    pieces = list(RowClass(buckets).pieces(rows))
    covered = [row for start, count, _ in pieces for row in range(start, start + count)]
    assert covered == list(range(rows))
    assert all(0 < count <= bucket and bucket in buckets for _, count, bucket in pieces)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 8, 9, 31])
def test_map_rows_calls_with_bucket_sizes_only_and_returns_every_row(rows: int) -> None:
    seen: list[int] = []

    def recording(x_MI: Tensor) -> Tensor:
        seen.append(len(x_MI))
        assert x_MI.is_contiguous()
        assert x_MI.data_ptr() % 64 == 0
        return x_MI.sum(1, keepdim=True) * torch.ones(3)

    x_MI = torch.randn(rows + 1, 7)[1:]  # not aligned
    out_MO = map_rows(recording, x_MI, RowClass((4, 8)))
    assert out_MO.shape == (rows, 3)
    torch.testing.assert_close(out_MO, x_MI.sum(1, keepdim=True).expand(rows, 3))
    assert set(seen) <= {4, 8}


def test_map_rows_takes_views_with_gaps() -> None:
    x_MI = torch.randn(6, 10)[:, 2:7]
    assert torch.equal(map_rows(doubled, x_MI, RowClass((2, 6))), x_MI * 2)


def test_same_bits_is_stricter_than_equality() -> None:
    zero, negative_zero, nan = torch.zeros(2), -torch.zeros(2), torch.full((2,), torch.nan)
    assert torch.equal(zero, negative_zero)
    assert not same_bits(zero, negative_zero)
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, torch.zeros(3))
    assert not same_bits(zero, torch.zeros(2, dtype=torch.float64))


def test_large_products_are_calibrated_on_fewer_rows() -> None:
    assert row_candidates(1e3) == ROW_CANDIDATES
    mixtral_ffn = row_candidates(6 * 4096 * 14336)
    assert mixtral_ffn[-1] == 32
    assert mixtral_ffn == ROW_CANDIDATES[: len(mixtral_ffn)]
    assert row_candidates(6 * 4096 * 14336, "cuda") == CUDA_ROW_CANDIDATES


@pytest.mark.parametrize(("outputs", "inputs"), [(112, 72), (64, 112), (576, 576), (8, 64)])
def test_a_real_product_gives_a_row_the_same_bits_in_any_company(outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight_IO = torch.randn(inputs, outputs, generator=generator)
    x_MI = torch.randn(140, inputs, generator=generator)

    def product(x: Tensor) -> Tensor:
        return x @ weight_IO

    row_class = calibrate_rows(product, inputs)
    whole_MO = map_rows(product, x_MI, row_class)
    for rows in (1, 2, 3, 5, 7, 16, 33, 100):
        for start in (0, 1, 40):
            part_MO = map_rows(product, x_MI[start : start + rows], row_class)
            assert same_bits(part_MO, whole_MO[start : start + rows]), (rows, start, row_class)


def test_every_bit_of_a_row_marks_it_and_no_other_row() -> None:
    x_MI = torch.randn(5, 300)
    marks = bit_marks(x_MI)
    assert marks.shape == (5, 2)
    assert same_bits(bit_marks(x_MI[3:4]), marks[3:4])
    for place in (0, 150, 299):
        for bit in (0, 13, 31):
            changed = x_MI.clone()
            changed.view(torch.int32)[2, place] ^= 1 << bit if bit < 31 else -(1 << 31)
            found = bit_marks(changed).view(torch.int64).flatten() != marks.view(torch.int64).flatten()
            assert found.tolist() == [False, False, True, False, False]
    swapped = x_MI[:, torch.tensor([1, 0, *range(2, 300)])]
    assert not (bit_marks(swapped).view(torch.int64) == marks.view(torch.int64)).any()
