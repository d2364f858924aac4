"""Keeps one replica reachable for as long as the map names it: connects, notices the end, connects again.

Waiting for a replica that is away is gRPC's (`wait_for_ready` with a capped back-off) and the replica's own
(`Attach` answers when it is ready), so nothing is polled here; only a replica that answers with an error is
asked again after a growing pause. Which replica gets which rows is `actors.dispatch.replica_pool`'s, how it stands
`cluster.replica_health`'s.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from functools import partial

from actors.dispatch.transport import (
    ExpertRequest,
    ExpertTransport,
    OpenTransport,
    PendingReply,
    TransportError,
    WireCounters,
)
from cluster.expert_map import ReplicaInfo
from cluster.replica_health import HealthBook
from cluster.replica_record import State
from cluster.replica_times import TimesBook
from protos import expert_pb2 as pb

LOG = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0
FIRST_PAUSE_S = 0.02
MAX_PAUSE_S = 1.0

_STEADY_S = 1.0  # a connection that lasted this long was a good one


def pauses() -> Iterator[float]:
    """Seconds between attempts: doubling from FIRST_PAUSE_S, at most MAX_PAUSE_S."""
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, MAX_PAUSE_S)


class ReplicaLink:
    """`on_change` is called when the replica becomes reachable or stops being so.

    `book` and `times_book`, shared by all links of a coordinator, keep the replica's `record` and `times`, whichever
    link leads there.
    """

    def __init__(
        self,
        replica: ReplicaInfo,
        open_transport: OpenTransport,
        counters: WireCounters,
        on_change: Callable[[], None],
        book: HealthBook,
        times_book: TimesBook,
    ) -> None:
        self.replica = replica
        self.record = book.record(replica.replica_id)
        self.times = times_book.of(replica.replica_id)
        self.unanswered = 0
        """Messages under way that somebody waits for, or did until another replica was asked."""
        self._failure = "not connected yet"
        self._book = book
        self._times_book = times_book
        self._clock = asyncio.get_running_loop().time
        self._open_transport = open_transport
        self._counters = counters
        self._on_change = on_change
        self._transport: ExpertTransport | None = None
        self._draining = False
        self._idle: asyncio.Event | None = None  # made when somebody waits for it
        self._keeper = asyncio.create_task(self._keep(), name=f"link to {replica.replica_id}")

    @property
    def lane(self) -> str:
        """`shm`, `grpc`, or empty while there is no connection."""
        return "" if self._transport is None else self._transport.lane

    @property
    def connected(self) -> bool:
        """True while there is a connection."""
        return self._transport is not None and not self._transport.closed.is_set()

    @property
    def usable(self) -> bool:
        """True while rows can be sent, and the answers be believed."""
        transport = self._transport
        return (
            transport is not None
            and not transport.closed.is_set()
            and not self._draining
            and self.record.state is not State.QUARANTINED
        )

    @property
    def failure(self) -> str:
        """Why it is not usable, or `connected`."""
        return f"quarantined: {self.record.detail}" if self.record.quarantined else self._failure

    def send(self, request: ExpertRequest) -> PendingReply:
        """Sends rows; see ExpertTransport.forward. Only while `usable`."""
        if self._transport is None:
            raise TransportError(self._failure)
        calls, rows, times = len(request.parts), request.num_rows, self.times
        times.calls += calls
        times.tokens += rows
        self.unanswered += 1
        reply = self._transport.forward(request)
        reply.when_done(partial(self._answered, calls, rows))
        return reply

    def mark_draining(self) -> None:
        """The replica said it takes nothing new: it gets nothing until it is connected to afresh."""
        self._draining = True
        self._failure = "draining"
        self._on_change()

    async def retire(self, timeout_s: float) -> None:
        """Closes when everything in flight is answered, after `timeout_s` in any case."""
        try:
            if self.unanswered:
                self._idle = asyncio.Event()
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
        except TimeoutError:
            LOG.warning("%s: closed with %d messages unanswered", self.replica.replica_id, self.unanswered)
        await self.close()

    async def close(self) -> None:
        """Closes now; what is unanswered fails."""
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)

    async def _keep(self) -> None:
        pause = pauses()
        loop = asyncio.get_running_loop()
        while True:
            since_s = loop.time()
            try:
                await self._use(await self._open_transport(self.replica, self._counters, CONNECT_TIMEOUT_S))
            except TransportError as error:
                self._failure = str(error)
                LOG.warning("%s cannot be reached: %s", self.replica.replica_id, error)
                self._transport = None
                self._on_change()
            if loop.time() - since_s >= _STEADY_S:
                pause = pauses()
            await asyncio.sleep(next(pause))

    async def _use(self, transport: ExpertTransport) -> None:
        self._transport = transport
        try:
            self._draining = False
            self._failure = "connected"
            if transport.incarnation != self.record.incarnation:
                self.times.begin_anew(self._times_book.typical())
            self._book.connected(self.record, transport.incarnation, self._clock())
            LOG.info("%s is connected by %s", self.replica.replica_id, transport.lane)
            self._on_change()
            await transport.closed.wait()
            self._counters.lost += 1
        finally:
            self._transport = None
            await transport.close()
        raise TransportError(transport.reason)

    def _answered(self, calls: int, rows: int, reply: PendingReply) -> None:
        times = self.times
        times.calls -= calls
        times.tokens -= rows
        answer = None if reply.cancelled() else reply.outcome()
        if answer is not None and not isinstance(answer, TransportError):
            if self.record.silent_since_s is not None:
                self._book.spoke(self.record)
            if answer.status == pb.STATUS_OK:
                times.answered(calls, rows, answer.compute_us, answer.inflight_tokens, self._clock())
        self.unanswered -= 1
        if self._idle is not None and self.unanswered == 0:
            self._idle.set()
