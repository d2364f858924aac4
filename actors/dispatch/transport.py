"""The seam between a coordinator and one replica: rows go out, rows come back, by whatever lane they agreed on.

`ExpertTransport` is the seam: `actors.dispatch.grpc_transport` always works, `actors.dispatch.lane_transport` is for
replicas on the same machine, `actors.dispatch.attach` agrees with the replica on one of them. A transport lives as
long as one connection: when that breaks, everything unanswered fails at once and the transport is done. Making a new
one is `actors.dispatch.replica_link`'s work, sending the rows somewhere else `actors.dispatch.expert_round`'s.

N routed rows of a layer, M rows of one message, D hidden size.
"""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from cluster.expert_map import ReplicaInfo
from protos import expert_pb2 as pb


class TransportError(Exception):
    """A connection that could not be made, or broke; the message says why."""


class ExpertRows(NamedTuple):
    """Rows of a layer's routed rows that are for one expert."""

    expert_id: int
    rows: slice

    @property
    def num_rows(self) -> int:
        count: int = self.rows.stop - self.rows.start
        return count


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """Rows that travel once for several experts: routed row i of the request is row `entries_M[i]` of `x_UD`, and its
    answer goes, times `weights_M[i]`, into that entry's sum.
    """

    x_UD: torch.Tensor
    entries_M: npt.NDArray[np.int64]
    weights_M: npt.NDArray[np.float32]


class ExpertRequest(NamedTuple):
    """Rows for experts of one replica in one layer. The deadline is absolute, microseconds since 1970.

    With `entries`, which only a transport whose rows travel understands, the reply has their sums.
    """

    layer_id: int
    map_epoch: int
    deadline_unix_us: int
    parts: tuple[ExpertRows, ...]
    x_ND: torch.Tensor
    entries: Entries | None = None

    @property
    def num_rows(self) -> int:
        """M."""
        total: int = 0
        for _, rows in self.parts:
            total += rows.stop - rows.start
        return total

    @property
    def x_MD(self) -> torch.Tensor:
        """The parts' rows one behind another: a view where they are adjacent."""
        first, last = self.parts[0], self.parts[-1]
        if last.rows.stop - first.rows.start == self.num_rows:
            return self.x_ND[first.rows.start : last.rows.stop]
        return torch.cat([self.x_ND[part.rows] for part in self.parts])


class ExpertReply(NamedTuple):
    """`output` is there exactly when `status` is OK: the answers (M, D) part by part, or the sums (U, D) of the
    entries, in the request's dtype.

    It may be a view of memory that is used again: copy it in the callback that hears of the reply. `malformed` says
    that the answer came whole and has another shape than the rows: not the wire's fault but the replica's.
    `inflight_tokens` are everybody's that are at the replica after these rows.
    """

    status: pb.Status
    detail: str = ""
    output: torch.Tensor | None = None
    compute_us: int = 0
    queue_us: int = 0
    malformed: bool = False
    inflight_tokens: int = 0


class PendingReply:
    """A reply to come. Like a future, but a callback runs at once, where the reply arrives, and not a loop's turn
    later: whoever waits without the event loop hears of it too. Ends once; what comes later is ignored.
    """

    __slots__ = ("_callback", "_cancelled", "_outcome", "_waiter")

    def __init__(self) -> None:
        self._outcome: ExpertReply | TransportError | None = None
        self._callback: Callable[[PendingReply], None] | None = None
        self._waiter: asyncio.Event | None = None
        self._cancelled = False

    def done(self) -> bool:
        return self._cancelled or self._outcome is not None

    def cancelled(self) -> bool:
        return self._cancelled

    def outcome(self) -> ExpertReply | TransportError:
        """What came. Raises CancelledError when nobody wanted it any more, InvalidStateError before its end."""
        if self._outcome is None:
            raise asyncio.CancelledError if self._cancelled else asyncio.InvalidStateError("no reply yet")
        return self._outcome

    def when_done(self, callback: Callable[["PendingReply"], None]) -> None:
        """Calls `callback` at the end, or now where that has come; callbacks run in the order given."""
        if self.done():
            callback(self)
        elif self._callback is None:
            self._callback = callback
        else:
            earlier = self._callback

            def both(reply: PendingReply) -> None:
                earlier(reply)
                callback(reply)

            self._callback = both

    def end(self, outcome: ExpertReply | TransportError) -> None:
        """The reply, or why there is none."""
        if self._outcome is None and not self._cancelled:
            self._outcome = outcome
            self._tell()

    def cancel(self) -> None:
        """Nobody waits any more."""
        if self._outcome is None and not self._cancelled:
            self._cancelled = True
            self._tell()

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended, after at most `timeout_s`."""
        if not self.done():
            if self._waiter is None:
                self._waiter = asyncio.Event()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._waiter.wait()
            except TimeoutError:
                return self.done()
        return True

    def __await__(self) -> Generator[None, None, ExpertReply]:
        """The reply. Raises TransportError."""
        yield from self.wait().__await__()
        outcome = self.outcome()
        if isinstance(outcome, TransportError):
            raise outcome
        return outcome

    def _tell(self) -> None:
        if self._waiter is not None:
            self._waiter.set()
        callback, self._callback = self._callback, None
        if callback is not None:
            callback(self)


@dataclass(slots=True)
class WireCounters:
    """What all transports of one coordinator did. Bytes are of serialised messages; on the same-node lane, of frames
    and the rows beside them. `lane_messages` are those of that lane, `merged_messages` those that asked for sums.
    `lost` are connections that ended by themselves.
    """

    messages: int = 0
    lane_messages: int = 0
    merged_messages: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    late_replies: int = 0
    corrupt_replies: int = 0
    lost: int = 0


class ExpertTransport(Protocol):
    """One connection to one replica, which can be asked."""

    @property
    def closed(self) -> asyncio.Event:
        """Set when the connection is over; `reason` says why."""
        ...

    @property
    def reason(self) -> str: ...

    @property
    def lane(self) -> str:
        """`grpc` or `shm`."""
        ...

    @property
    def incarnation(self) -> str:
        """Names the process at the other end: another one after a restart, also at the same address."""
        ...

    def forward(self, request: ExpertRequest) -> PendingReply:
        """Sends rows without waiting. The reply is a TransportError when the connection ends first; to cancel it is
        to ignore what comes.
        """
        ...

    async def close(self) -> None:
        """Ends the connection; what is unanswered fails. May be called twice."""
        ...


OpenTransport = Callable[[ReplicaInfo, WireCounters, float], Awaitable[ExpertTransport]]
"""Connects to a replica, within so many seconds. Raises TransportError."""
