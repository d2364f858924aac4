"""Where the routing of live traffic can be listened to: nothing is kept while nobody does.

Each listener has a bounded queue; what finds no room there is dropped and counted, because serving never waits for a
trace. What is recorded is `actors.coordinator.routing_log`'s decision, writing it to a file is done elsewhere.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable

from protos.coordinator_pb2 import TraceArrival, TraceChunk, TraceEnd, TraceStep

MAX_LISTENERS = 4
MAX_PENDING_BYTES = 32 << 20
"""Of one listener: two minutes of 32 layers, top-2, at 4,000 tokens a second."""
MAX_CHUNK_BYTES = 1 << 20
EVENT_BYTES = 32

Record = TraceArrival | TraceStep | TraceEnd


class TooManyListeners(Exception):
    """`MAX_LISTENERS` listen already."""


class TraceTap:
    """Of one coordinator. `shape` is (layers, experts, top-k). Everything is called from one event loop."""

    def __init__(self, shape: tuple[int, int, int], wall_clock: Callable[[], float] = time.time) -> None:
        self.tokens_total = 0
        self.dropped_total = 0
        self.closed = False
        self._shape = shape
        self._wall_clock = wall_clock
        self._listeners: set[Listener] = set()

    @property
    def listening(self) -> bool:
        """True while somebody does."""
        return bool(self._listeners)

    @property
    def num_listeners(self) -> int:
        """How many listen."""
        return len(self._listeners)

    def listen(self, max_pending_bytes: int = MAX_PENDING_BYTES) -> "Listener":
        """Begins to listen; `leave` ends it. Raises TooManyListeners."""
        if len(self._listeners) >= MAX_LISTENERS:
            raise TooManyListeners(f"{len(self._listeners)} listen already, the most there may be")
        listener = Listener(self, self._shape, max_pending_bytes)
        self._listeners.add(listener)
        return listener

    def leave(self, listener: "Listener") -> None:
        """Nobody reads it any more."""
        self._listeners.discard(listener)

    def close(self) -> None:
        """Nothing more will come: listeners end when they have read what there is."""
        self.closed = True
        for listener in self._listeners:
            listener.filled.set()

    def arrived(self, sequence: int, prompt_tokens: int) -> None:
        """A request came."""
        self._put(
            TraceArrival(sequence=sequence, time_unix_us=self._now_us(), prompt_tokens=prompt_tokens), EVENT_BYTES, 0
        )

    def took(self, sequences: bytes, positions: bytes, experts: bytes, num_tokens: int) -> None:
        """A step was computed; the columns are those of `TraceStep`."""
        self.tokens_total += num_tokens
        step = TraceStep(time_unix_us=self._now_us(), sequences=sequences, positions=positions, experts=experts)
        self._put(step, EVENT_BYTES + len(sequences) + len(positions) + len(experts), num_tokens)

    def ended(self, sequence: int, output_tokens: int) -> None:
        """A sequence came to its end, whatever that is."""
        self._put(TraceEnd(sequence=sequence, output_tokens=output_tokens), EVENT_BYTES, 0)

    def _put(self, record: Record, num_bytes: int, num_tokens: int) -> None:
        for listener in self._listeners:
            if not listener.put(record, num_bytes):
                listener.dropped_tokens += num_tokens
                self.dropped_total += num_tokens

    def _now_us(self) -> int:
        return int(self._wall_clock() * 1e6)


class Listener:
    """What one reader has not read yet. `filled` is set when there is something, or when nothing more will come."""

    def __init__(self, tap: TraceTap, shape: tuple[int, int, int], max_pending_bytes: int) -> None:
        self.filled = asyncio.Event()
        self.dropped_tokens = 0
        self._tap = tap
        self._shape = shape
        self._max_bytes = max_pending_bytes
        self._pending: deque[tuple[Record, int]] = deque()
        self._bytes = 0

    def put(self, record: Record, num_bytes: int) -> bool:
        """False where there is no room for it."""
        if self._bytes + num_bytes > self._max_bytes:
            return False
        self._pending.append((record, num_bytes))
        self._bytes += num_bytes
        self.filled.set()
        return True

    @property
    def done(self) -> bool:
        """True when all is read and nothing more will come."""
        return self._tap.closed and not self._pending

    @property
    def has_chunk(self) -> bool:
        """True when a message would be full, or nothing more will come."""
        return self._tap.closed or self._bytes >= MAX_CHUNK_BYTES

    def take(self, coordinator_id: str) -> TraceChunk:
        """What waits, in order, up to about `MAX_CHUNK_BYTES`; may be empty."""
        layers, experts, top_k = self._shape
        chunk = TraceChunk(
            coordinator_id=coordinator_id,
            num_layers=layers,
            num_experts=experts,
            top_k=top_k,
            dropped_tokens=self.dropped_tokens,
        )
        size = 0
        while self._pending and size < MAX_CHUNK_BYTES:
            record, num_bytes = self._pending.popleft()
            self._bytes -= num_bytes
            size += num_bytes
            if isinstance(record, TraceStep):
                chunk.steps.append(record)
            elif isinstance(record, TraceArrival):
                chunk.arrivals.append(record)
            else:
                chunk.ends.append(record)
        if not self._pending and not self._tap.closed:
            self.filled.clear()
        return chunk
