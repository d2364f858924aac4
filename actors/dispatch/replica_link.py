"""Keeps one replica reachable for as long as the map names it: connects, notices the end, connects again.

Waiting for a replica that is away is gRPC's (`wait_for_ready` with a capped back-off) and the replica's own
(`Attach` answers when it is ready), so nothing is polled here; only a replica that answers with an error is
asked again after a growing pause. Which replica gets which rows is `actors.dispatch.remote_experts`'s.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, MutableMapping
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
from cluster.ids import ReplicaId

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

    `inflight` is shared by all links of a coordinator: rows sent and not answered, by replica.
    """

    def __init__(
        self,
        replica: ReplicaInfo,
        open_transport: OpenTransport,
        counters: WireCounters,
        inflight: MutableMapping[ReplicaId, int],
        on_change: Callable[[], None],
    ) -> None:
        self.replica = replica
        self.failure = "not connected yet"
        self.suspect = False
        self._open_transport = open_transport
        self._counters = counters
        self._inflight = inflight
        self._on_change = on_change
        self._transport: ExpertTransport | None = None
        self._draining = False
        self._unanswered = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._keeper = asyncio.create_task(self._keep(), name=f"link to {replica.replica_id}")

    @property
    def lane(self) -> str:
        """`shm`, `grpc`, or empty while there is no connection."""
        return "" if self._transport is None else self._transport.lane

    @property
    def usable(self) -> bool:
        """True while rows can be sent."""
        return self._transport is not None and not self._transport.closed.is_set() and not self._draining

    def send(self, request: ExpertRequest) -> PendingReply:
        """Sends rows; see ExpertTransport.forward. Only while `usable`."""
        if self._transport is None:
            raise TransportError(self.failure)
        rows = request.num_rows
        replica_id = self.replica.replica_id
        self._inflight[replica_id] = self._inflight.get(replica_id, 0) + rows
        self._unanswered += 1
        self._idle.clear()
        reply = self._transport.forward(request)
        reply.when_done(partial(self._answered, rows))
        return reply

    def mark_suspect(self) -> None:
        """It took too long: others are preferred until it answers anything, or is connected to afresh."""
        self.suspect = True

    def mark_draining(self) -> None:
        """The replica said it takes nothing new: it gets nothing until it is connected to afresh."""
        self._draining = True
        self.failure = "draining"
        self._on_change()

    async def retire(self, timeout_s: float) -> None:
        """Closes when everything in flight is answered, after `timeout_s` in any case."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            LOG.warning("%s: closed with %d messages unanswered", self.replica.replica_id, self._unanswered)
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
                self.failure = str(error)
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
            self.suspect = False
            self.failure = "connected"
            LOG.info("%s is connected by %s", self.replica.replica_id, transport.lane)
            self._on_change()
            await transport.closed.wait()
        finally:
            self._transport = None
            await transport.close()
        raise TransportError(transport.reason)

    def _answered(self, rows: int, reply: PendingReply) -> None:
        if not reply.cancelled() and not isinstance(reply.outcome(), TransportError):
            self.suspect = False
        self._inflight[self.replica.replica_id] -= rows
        self._unanswered -= 1
        if self._unanswered == 0:
            self._idle.set()
