"""What one expert actor holds and how it fares: its columns, its state, its counters, and how it describes itself.

State changes on the actor's event loop; tokens are counted there and in the compute thread, under a lock. Who fills it
is `actors.expert.actor`, who serves from it `actors.expert.desk`.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from actors.machine import machine_id
from protos.expert_pb2 import (
    REPLICA_STATE_DRAINING,
    REPLICA_STATE_FAILED,
    REPLICA_STATE_LOADING,
    REPLICA_STATE_READY,
    InfoReply,
    ReplicaState,
)

_STATE_NAMES = {
    REPLICA_STATE_LOADING: "loading",
    REPLICA_STATE_READY: "ready",
    REPLICA_STATE_DRAINING: "draining",
    REPLICA_STATE_FAILED: "failed",
}


class Column(Protocol):
    """One expert's FFNs for some layers; `model.experts.ExpertColumn` is the real one."""

    @property
    def layers(self) -> Collection[int]: ...

    @property
    def kernel(self) -> str: ...

    @property
    def numerics_domain(self) -> str: ...

    @property
    def weight_bytes(self) -> int: ...

    def forward(self, layer: int, x_MD: torch.Tensor) -> torch.Tensor: ...

    def canary(self, layer: int) -> bytes: ...


@dataclass(slots=True)
class ReplicaCounters:
    """Since start. Times in microseconds, tokens are rows."""

    messages_total: int = 0
    tokens_total: int = 0
    refused_total: int = 0
    errors_total: int = 0
    compute_us_total: int = 0
    queue_us_total: int = 0
    canaries_total: int = 0
    canary_us_total: int = 0


@dataclass(slots=True)
class LoadProgress:
    """How far loading is, in bytes of the checkpoint, and whence they came; `seconds` is set when it has ended."""

    bytes_loaded: int = 0
    bytes_total: int = 0
    loaded_from_peer_bytes: int = 0
    loaded_from_disk_bytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class ExpertReplica:
    """`experts` and `layers` are what it was started for; `settled` is set once loading has ended.

    `opened` is set once it serves something: while it loads, the layers that it has already.
    """

    replica_id: str
    experts: tuple[int, ...]
    layers: range
    node_id: str = ""
    hidden_size: int = 0
    state: ReplicaState = REPLICA_STATE_LOADING
    detail: str = ""
    map_epoch: int = 0
    inflight_tokens: int = 0
    address: str = ""
    counters: ReplicaCounters = field(default_factory=ReplicaCounters)
    progress: LoadProgress = field(default_factory=LoadProgress)
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    on_idle: tuple[Callable[[], None], ...] = ()
    """Called, in any thread, whenever the last token in flight is answered."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _columns: list[Column] = field(default_factory=list)
    _held: dict[tuple[int, int], Column] = field(default_factory=dict)

    def add(self, expert: int, column: Column) -> None:
        """Serves `column` from now on; again, once it has more layers."""
        if not any(known is column for known in self._columns):
            self._columns.append(column)
        self._held |= {(layer, expert): column for layer in column.layers}

    @property
    def ready_layers(self) -> int:
        """How many leading layers of its range it holds, of all its experts."""
        whole = (all((layer, expert) in self._held for expert in self.experts) for layer in self.layers)
        return next((count for count, held in enumerate(whole) if not held), len(self.layers))

    @property
    def serves_while_loading(self) -> bool:
        """True when some layers are ready and others still to come."""
        return self.state == REPLICA_STATE_LOADING and self.opened.is_set()

    def find(self, layer: int, expert: int) -> Column | None:
        """The column that holds (layer, expert), or None."""
        return self._held.get((layer, expert))

    def holds(self, expert: int, layers: Iterable[int]) -> bool:
        """True when it holds `expert` in all of `layers`."""
        return all((layer, expert) in self._held for layer in layers)

    def take(self, tokens: int, limit: int) -> int | None:
        """Takes tokens in, unless more than `limit` would be in flight: then the room there is. None is yes."""
        with self._lock:
            if self.state == REPLICA_STATE_DRAINING:
                return 0  # it began to drain since the caller looked: the sender asks again, and is told so
            if self.inflight_tokens + tokens > limit:
                return limit - self.inflight_tokens
            self.inflight_tokens += tokens
            self.counters.messages_total += 1
            return None

    def refuse(self) -> None:
        """Counts a message that was not taken in."""
        with self._lock:
            self.counters.messages_total += 1
            self.counters.refused_total += 1

    def give_back(self, inflight: int, *, tokens: int, queue_us: int, compute_us: int, errors: int) -> None:
        """What `take` took in is answered."""
        with self._lock:
            self.inflight_tokens -= inflight
            idle = self.inflight_tokens == 0
            counters = self.counters
            counters.tokens_total += tokens
            counters.queue_us_total += queue_us
            counters.compute_us_total += compute_us
            counters.errors_total += errors
        if idle and self.on_idle:
            for tell in self.on_idle:
                tell()

    def begin_drain(self) -> None:
        """Takes nothing more in; what is taken in is answered."""
        with self._lock:
            if self.state != REPLICA_STATE_FAILED:
                self.state = REPLICA_STATE_DRAINING

    def settle(self, state: ReplicaState, detail: str = "") -> None:
        """Loading has ended: READY or FAILED. Who was told to drain meanwhile stays DRAINING, who has failed FAILED."""
        with self._lock:
            if self.state == REPLICA_STATE_LOADING or (
                state == REPLICA_STATE_FAILED and self.state != REPLICA_STATE_FAILED
            ):
                self.state, self.detail = state, detail
        self.opened.set()
        self.settled.set()

    def fail(self, detail: str) -> None:
        """It was ready, and must not be trusted any more: takes nothing in, and computes nothing. In any thread."""
        with self._lock:
            self.state, self.detail = REPLICA_STATE_FAILED, detail

    def describe(self) -> InfoReply:
        """The replica as its peers see it; `expert_ids` are those held in all of `layers`."""
        experts = sorted({expert for _, expert in self._held})
        return InfoReply(
            replica_id=self.replica_id,
            expert_ids=[expert for expert in experts if self.holds(expert, self.layers)],
            first_layer=self.layers.start,
            num_layers=len(self.layers),
            pid=os.getpid(),
            node_id=self.node_id,
            address=self.address,
            state=self.state,
            inflight_tokens=self.inflight_tokens,
            kernel=_joined(column.kernel for column in self._columns),
            numerics_domain=_joined(column.numerics_domain for column in self._columns),
            machine_id=machine_id(),
            weight_bytes=sum(column.weight_bytes for column in self._columns),
            map_epoch=self.map_epoch,
            hidden_size=self.hidden_size,
            tokens_total=self.counters.tokens_total,
            detail=self.detail,
            ready_layers=self.ready_layers,
        )


def state_name(state: ReplicaState) -> str:
    """`loading`, `ready`, `draining` or `failed`."""
    return _STATE_NAMES[state]


def _joined(values: Iterable[str]) -> str:
    return "+".join(sorted(set(values)))
