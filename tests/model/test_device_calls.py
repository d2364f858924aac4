"""Captured calls answer as direct ones, and are bounded; staged rows arrive whole. Without a GPU, by stand-ins."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.device_calls import LARGEST_GRAPHED_ROWS, GraphedCalls, Staging, prepare_device, upload
from model.numerics import RowClass, RowFunction, map_rows, same_bits


class FakeCapture:
    """Like a CUDA graph: replays on the captured input's memory, into the same output every time."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.replays = 0

    def __call__(self, fn: RowFunction, x_MI: Tensor) -> Callable[[], Tensor]:
        self.captured.append(len(x_MI))
        out_MO = fn(x_MI).clone()

        def replay() -> Tensor:
            self.replays += 1
            return out_MO.copy_(fn(x_MI))

        return replay


def doubled(x_MI: Tensor) -> Tensor:
    return x_MI * 2


def tripled(x_MI: Tensor) -> Tensor:
    return x_MI * 3


def test_every_row_count_is_captured_once_and_answers_are_kept_apart() -> None:
    capture = FakeCapture()
    graphs = GraphedCalls(capture)
    first, second = graphs.wrap(doubled), graphs.wrap(tripled)
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    got_a, got_b, other = first(a), first(b), second(a)
    assert torch.equal(got_a, a * 2)
    assert torch.equal(got_b, b * 2)
    assert torch.equal(other, a * 3)
    first(torch.ones(2, 3))
    assert capture.captured == [4, 4, 2]
    assert capture.replays == 4


def test_large_calls_and_those_beyond_the_bound_are_made_directly() -> None:
    capture = FakeCapture()
    call = GraphedCalls(capture, max_graphs=1).wrap(doubled)
    for rows in (LARGEST_GRAPHED_ROWS + 1, 2, 4, 2):
        x_MI = torch.randn(rows, 3)
        assert torch.equal(call(x_MI), x_MI * 2)
    assert capture.captured == [2]
    assert capture.replays == 2


@pytest.mark.parametrize("rows", [0, 1, 5, 8, 13])
def test_rows_are_padded_to_buckets_before_they_are_captured(rows: int) -> None:
    capture = FakeCapture()
    call = GraphedCalls(capture).wrap(doubled)
    x_MI = torch.randn(rows, 3)
    for _ in range(2):
        assert torch.equal(map_rows(call, x_MI, RowClass((4, 8))), x_MI * 2)
    assert set(capture.captured) <= {4, 8}
    assert len(capture.captured) == len(set(capture.captured))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_staged_rows_arrive_whole_and_are_the_callers_own(dtype: torch.dtype) -> None:
    staging = Staging(torch.device("cpu"))
    kept = []
    for rows in (3, 1, 0, 40, 3):
        x_MI = torch.randn(rows, 6).to(dtype)
        on_device = staging.to_device(x_MI[:, :])
        kept.append((x_MI, on_device, staging.to_host(on_device)))
    for x_MI, on_device, back in kept:
        assert same_bits(on_device, x_MI)
        assert same_bits(back, x_MI)


def test_staging_keeps_its_memory() -> None:
    staging = Staging(torch.device("cpu"))
    staging.to_device(torch.zeros(8, 4))
    held = staging._buffers["up"].data_ptr()
    staging.to_device(torch.zeros(5, 4, dtype=torch.bfloat16))
    assert staging._buffers["up"].data_ptr() == held


def test_rows_are_padded_in_the_captured_memory() -> None:
    call = GraphedCalls(FakeCapture()).wrap(doubled)
    for rows in (3, 4, 1):
        x_MI = torch.randn(rows, 5)
        answers = call.padded(x_MI, 4)
        assert answers is not None
        assert torch.equal(answers, x_MI * 2)
    assert call.padded(torch.randn(3, 5), LARGEST_GRAPHED_ROWS + 1) is None


def test_what_cannot_be_captured_is_tried_once_and_made_directly() -> None:
    tried: list[int] = []

    def fails(fn: RowFunction, x_MI: Tensor) -> Callable[[], Tensor]:
        tried.append(len(x_MI))
        raise RuntimeError("out of memory")

    call = GraphedCalls(fails).wrap(doubled)
    for _ in range(3):
        x_MI = torch.randn(2, 3)
        assert torch.equal(call(x_MI), x_MI * 2)
    assert tried == [2]
    assert call.padded(torch.randn(1, 3), 2) is None


def test_without_a_gpu_nothing_is_uploaded_or_set() -> None:
    x = torch.randn(3)
    assert upload(x, "cpu") is x
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    prepare_device("cpu")
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is before
