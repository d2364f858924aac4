"""What makes calls of a row function cheap on a GPU: CUDA graphs per row count, and pinned memory on the way.

Which row counts there are is decided by `model.numerics`, whose buckets keep the number of graphs small. `tests/gpu`
run it on a GPU (so far an H200 with torch 2.11 for CUDA 13.0), the other tests with a stand-in for the capture.

Tensor suffixes: M rows of one call, I and O input and output width.
"""

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.numerics import RowFunction

LOG = logging.getLogger(__name__)

Capture = Callable[[RowFunction, Tensor], Callable[[], Tensor]]
"""Runs a function once on a tensor that stays; what it returns runs it again on what is in that tensor then."""

LARGEST_GRAPHED_ROWS = 256
"""A call of more rows computes for longer than its kernels take to launch."""

MAX_GRAPHS = 512

_GRAPHS = threading.RLock()
"""Held while a graph is made or ended: torch keeps a list of them without a lock, and aborts where one is not in it."""

_WARM_UP_CALLS = 2


class GraphedCalls:
    """Row functions of one thread that share a bounded number of captured calls and one memory pool.

    A call is captured when its row count is seen first, unless it is too large, the bound is reached, or it cannot be
    captured (for want of memory, say). Inputs of one shape are shared by all functions: calls are one after the other.
    """

    def __init__(self, capture: Capture | None = None, *, max_graphs: int = MAX_GRAPHS) -> None:
        self.capture = _CudaCapture() if capture is None else capture
        self.left = max_graphs
        self._inputs: dict[tuple[int, ...], Tensor] = {}

    def wrap(self, fn: RowFunction) -> "GraphedCall":
        """`fn`, replayed."""
        return GraphedCall(fn, self)

    def input(self, rows: int, x_MI: Tensor) -> Tensor:
        """The memory that calls of `rows` rows like those of x_MI read; what a call leaves over is from others."""
        shape = (rows, *x_MI.shape[1:])
        if shape not in self._inputs:
            self._inputs[shape] = x_MI.new_zeros(shape)
        return self._inputs[shape]


class GraphedCall:
    """One function of `GraphedCalls`."""

    def __init__(self, fn: RowFunction, calls: GraphedCalls) -> None:
        self._fn = fn
        self._calls = calls
        self._replays: dict[int, Callable[[], Tensor] | None] = {}

    def __call__(self, x_MI: Tensor) -> Tensor:
        """x_MO, the caller's own: replayed, or made directly, with the same bits."""
        found_MO = self.padded(x_MI, len(x_MI))
        return self._fn(x_MI) if found_MO is None else found_MO.clone()

    def padded(self, x_MI: Tensor, bucket: int) -> Tensor | None:
        """x_MO by a replay of `bucket` rows, valid until the next; None where there is none."""
        if bucket not in self._replays:
            if bucket > LARGEST_GRAPHED_ROWS or self._calls.left == 0:
                return None
            self._calls.left -= 1
            self._replays[bucket] = self._captured(self._calls.input(bucket, x_MI))
        replay = self._replays[bucket]
        if replay is None:
            return None
        self._calls.input(bucket, x_MI)[: len(x_MI)].copy_(x_MI)
        return replay()[: len(x_MI)]

    def _captured(self, held_MI: Tensor) -> Callable[[], Tensor] | None:
        try:
            return self._calls.capture(self._fn, held_MI)
        except RuntimeError as error:
            LOG.warning("calls of %d rows are made without a graph: %s", len(held_MI), error)
            return None


class _CudaCapture:
    """Captures into one memory pool, on one stream; other threads may use the GPU meanwhile.

    One stream, because each that multiplies gets a workspace of its own from the library, and keeps it.
    """

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, fn: RowFunction, x_MI: Tensor) -> Callable[[], Tensor]:
        with _GRAPHS:
            return self._captured(fn, x_MI)

    def _captured(self, fn: RowFunction, x_MI: Tensor) -> "_Replay":
        graph = torch.cuda.CUDAGraph()
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            for _ in range(_WARM_UP_CALLS):  # libraries choose and allocate in them, which no graph may hold
                fn(x_MI)
            self._aside.synchronize()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                out_MO = fn(x_MI)
            except RuntimeError:
                self._pool = torch.cuda.graph_pool_handle()  # the allocator is not done with the old one
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._aside)
        return _Replay(graph, out_MO)


class _Replay:
    """A captured call. Its end, too, waits for whoever captures: see `_GRAPHS`."""

    def __init__(self, graph: Any, out_MO: Tensor) -> None:
        self._graph = graph
        self._out_MO = out_MO
        self._alone = _GRAPHS

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self._out_MO

    def __del__(self) -> None:
        with self._alone:
            del self._graph


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


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """x on `device`; on a GPU the copy may still be under way, and nobody waits for it.

    A plain copy waits until the GPU has done all it was given. The pinned memory is torch's own and is used again once
    the copy is done.
    """
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def prepare_device(device: torch.device | str) -> None:
    """Sums in fp32 throughout, for this process: torch may shorten them on GPUs otherwise."""
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.set_float32_matmul_precision("highest")
