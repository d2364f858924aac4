"""What makes calls of a row function cheap on a GPU: CUDA graphs per row count, and pinned memory on the way.

Never run on a GPU yet: the test suite has run it with a stand-in for the capture, and with ordinary memory. Which
row counts there are is decided by `model.numerics`, whose buckets keep the number of graphs small.

Tensor suffixes: M rows of one call, I and O input and output width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.numerics import RowFunction

Capture = Callable[[RowFunction, Tensor], Callable[[], Tensor]]
"""Runs a function once on a tensor that stays; what it returns runs it again on what is in that tensor then."""

LARGEST_GRAPHED_ROWS = 64
"""A call of more rows computes for longer than its kernels take to launch."""

MAX_GRAPHS = 512
_WARM_UP_CALLS = 2


class GraphedCalls:
    """Row functions of one thread that share a bounded number of captured calls and one memory pool.

    A call is captured when its row count is seen first, and made directly where it is too large, or the bound is
    reached. Inputs of one shape are shared by all functions: calls are one after the other.
    """

    def __init__(self, capture: Capture | None = None, *, max_graphs: int = MAX_GRAPHS) -> None:
        self._capture = _CudaCapture() if capture is None else capture
        self._left = max_graphs
        self._inputs: dict[tuple[int, ...], Tensor] = {}

    def wrap(self, fn: RowFunction) -> RowFunction:
        """`fn`, replayed."""
        replays: dict[int, Callable[[], Tensor]] = {}

        def call(x_MI: Tensor) -> Tensor:
            rows = len(x_MI)
            if rows not in replays:
                if rows > LARGEST_GRAPHED_ROWS or self._left == 0:
                    return fn(x_MI)
                replays[rows] = self._capture(fn, self._input(x_MI))
                self._left -= 1
            self._input(x_MI).copy_(x_MI)
            return replays[rows]().clone()  # the next replay overwrites it

        return call

    def _input(self, x_MI: Tensor) -> Tensor:
        shape = tuple(x_MI.shape)
        if shape not in self._inputs:
            self._inputs[shape] = x_MI.clone()
        return self._inputs[shape]


class _CudaCapture:
    """Captures into one memory pool; other threads may use the GPU meanwhile."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, fn: RowFunction, x_MI: Tensor) -> Callable[[], Tensor]:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose and allocate in their first calls, which no graph may hold
            for _ in range(_WARM_UP_CALLS):
                fn(x_MI)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out_MO = fn(x_MI)

        def replay() -> Tensor:
            graph.replay()
            return out_MO

        return replay


class Staging:
    """Pinned host memory that rows pass through on their way to `device` and back, grown as needed.

    One thread at a time, and every `to_device` is followed by a `to_host` before the next. Without a GPU the
    memory is ordinary.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def to_device(self, x_MI: Tensor) -> Tensor:
        """A copy on the device, in the dtype of x_MI; the copy may still be under way."""
        staged_MI = self._buffer("up", x_MI).copy_(x_MI)
        return torch.empty_like(x_MI, device=self._device).copy_(staged_MI, non_blocking=True)

    def to_host(self, y_MO: Tensor) -> Tensor:
        """A copy in host memory, complete, and the caller's own."""
        staged_MO = self._buffer("down", y_MO).copy_(y_MO, non_blocking=True)
        if y_MO.device.type == "cuda":
            torch.cuda.current_stream(y_MO.device).synchronize()
        return staged_MO.clone()

    def _buffer(self, way: str, like: Tensor) -> Tensor:
        """Host memory of `like`'s shape and dtype, the same from call to call."""
        held = self._buffers.get(way)
        if held is None or held.numel() < like.nbytes:
            size = 1 << max(0, like.nbytes - 1).bit_length()
            held = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self._buffers[way] = held
        return held[: like.nbytes].view(like.dtype).view(like.shape)
