"""What several coordinators told of their tokens' experts, as one routing trace.

A chunk is believed in nothing: its columns must agree with each other and with those of the others. Times are the
coordinators' own wall clocks. Listening to them is `experiments.trace_record`'s, the file `cluster.routing_trace`'s.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.routing_trace import RoutingTrace, TraceError
from protos.coordinator_pb2 import TraceChunk, TraceStep

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Request:
    """One that came while somebody listened. `output` counts tokens; until its end, those that were seen."""

    arrived_us: int
    prompt: int
    output: int = 1
    ended: bool = False


class TraceMerger:
    """Chunks of one stream must be added in their order, under one name that no other stream has."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_ended = 0
        self._shape: tuple[int, int, int] | None = None
        self._requests: list[_Request] = []
        self._known: dict[tuple[str, int], int] = {}
        self._dropped: dict[str, int] = {}
        self._times_us: list[Ints] = []
        self._owners: list[Ints] = []
        self._experts: list[npt.NDArray[Any]] = []

    @property
    def num_requests(self) -> int:
        """Requests that came."""
        return len(self._requests)

    @property
    def dropped_tokens(self) -> int:
        """Tokens that coordinators recorded and could not tell in time."""
        return sum(self._dropped.values())

    def add(self, stream: str, chunk: TraceChunk) -> None:
        """Raises TraceError, and adds nothing, for a chunk that cannot be, or is of another model than the first."""
        shape = (chunk.num_layers, chunk.num_experts, chunk.top_k)
        if self._shape is None and min(shape) >= 1:
            self._shape = shape
        if shape != self._shape:
            raise TraceError(f"{stream} told of (layers, experts, top-k) {shape}, but the first of {self._shape}")
        columns = [_columns(stream, step, shape) for step in chunk.steps]
        for arrival in chunk.arrivals:
            self._known[stream, arrival.sequence] = len(self._requests)
            self._requests.append(_Request(arrival.time_unix_us, max(1, arrival.prompt_tokens)))
        for step, (sequences, positions, experts_TLK) in zip(chunk.steps, columns, strict=True):
            self._add_step(stream, step, sequences, positions, experts_TLK)
        for end in chunk.ends:
            index = self._known.pop((stream, end.sequence), None)
            if index is not None:
                self._requests[index].output, self._requests[index].ended = max(1, end.output_tokens), True
                self.num_ended += 1
        self._dropped[stream] = chunk.dropped_tokens

    def trace(self) -> RoutingTrace:
        """All that was told, in order of time from the first moment on. Raises TraceError where nothing was."""
        if self._shape is None or not self.num_tokens:
            raise TraceError("no token was routed while it was recorded")
        times_us, owners = np.concatenate(self._times_us), np.concatenate(self._owners)
        order = np.argsort(times_us, kind="stable")
        arrived_us = np.array([one.arrived_us for one in self._requests], np.int64)
        by_arrival = np.argsort(arrived_us, kind="stable")
        rank = np.append(np.argsort(by_arrival, kind="stable"), -1)  # the owner -1 stays that
        first_us = int(np.append(times_us, arrived_us).min())
        requests = [self._requests[index] for index in by_arrival]
        return RoutingTrace(
            num_experts=self._shape[1],
            arrival_s=(arrived_us[by_arrival] - first_us) / 1e6,
            prompt_tokens=np.array([one.prompt for one in requests], np.int32),
            output_tokens=np.array([one.output for one in requests], np.int32),
            token_time_s=(times_us[order] - first_us) / 1e6,
            token_request=rank[owners[order]].astype(np.int32),
            experts=np.concatenate(self._experts)[order],
        )

    def _add_step(
        self, stream: str, step: TraceStep, sequences: Ints, positions: Ints, experts_TLK: npt.NDArray[Any]
    ) -> None:
        owners = np.full(len(sequences), -1)
        for place, (sequence, position) in enumerate(zip(sequences.tolist(), positions.tolist(), strict=True)):
            index = self._known.get((stream, sequence), -1)
            if index >= 0:
                owners[place] = index
                one = self._requests[index]
                one.output = max(one.output, position + 2 - one.prompt)  # a position's token says the next one
        self._times_us.append(np.full(len(sequences), step.time_unix_us, np.int64))
        self._owners.append(owners)
        self._experts.append(experts_TLK)
        self.num_tokens += len(sequences)


def _columns(stream: str, step: TraceStep, shape: tuple[int, int, int]) -> tuple[Ints, Ints, npt.NDArray[Any]]:
    """Sequences, positions and experts_TLK of a step."""
    layers, experts, top_k = shape
    dtype = np.dtype(np.uint8 if experts <= 256 else "<u2")
    tokens, rest = divmod(len(step.sequences), 8)
    expected = tokens * layers * top_k * dtype.itemsize
    if rest or len(step.positions) != 4 * tokens or len(step.experts) != expected:
        raise TraceError(
            f"{stream} told a step with {len(step.sequences)} bytes of sequences, {len(step.positions)} of positions "
            f"and {len(step.experts)} of experts, which do not fit (layers, experts, top-k) {shape}"
        )
    chosen = np.frombuffer(step.experts, dtype).reshape(tokens, layers, top_k)
    if chosen.size and int(chosen.max()) >= experts:
        raise TraceError(f"{stream} told of expert {int(chosen.max())}, but there are {experts}")
    sequences = np.frombuffer(step.sequences, "<u8").astype(np.int64)
    native: npt.NDArray[Any] = chosen.astype(dtype.newbyteorder("="), copy=False)
    return sequences, np.frombuffer(step.positions, "<u4").astype(np.int64), native
