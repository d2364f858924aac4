"""The coordinator's end of the same-node lane: a frame over a Unix socket, rows in memory that both sides see.

The socket is the doorbell and the death notice: its end means that the replica's process is gone, and comes at
once. A reply is read where somebody waits for it (`LaneDoorbells.wait`, without the event loop) or, when nobody
does, by the event loop. The frames are `protos.lane`'s, the replica's end is `actors.expert.lane_server`.
"""

import asyncio
import logging
import select
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from actors.dispatch.transport import ExpertReply, ExpertRequest, PendingReply, TransportError, WireCounters
from actors.shared_rows import RegionError, RowSpace, RowsPool, SharedRows
from protos import expert_pb2 as pb
from protos.codec import CodecError
from protos.lane import MAX_FRAME_BYTES, MAX_SEGMENTS, Hello, LaneReply, LaneRequest, Segment, is_welcome, region_bytes

LOG = logging.getLogger(__name__)


class LaneDoorbells:
    """All lanes of one coordinator, for whoever wants to wait for replies without a turn of the event loop."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._receivers: dict[int, Callable[[], None]] = {}
        self._loop = asyncio.get_running_loop()

    def add(self, fd: int, receive: Callable[[], None]) -> None:
        """`receive` is called when `fd` can be read."""
        self._receivers[fd] = receive
        self._poll.register(fd, select.EPOLLIN)
        self._loop.add_reader(fd, receive)

    def remove(self, fd: int) -> None:
        if self._receivers.pop(fd, None) is not None:
            self._loop.remove_reader(fd)
            self._poll.unregister(fd)

    def wait(self, timeout_s: float) -> bool:
        """Receives what comes first, blocking; False when nothing came in time."""
        events = self._poll.poll(timeout_s)
        for fd, _ in events:
            receive = self._receivers.get(fd)
            if receive is not None:
                receive()
        return bool(events)

    def close(self) -> None:
        for fd in list(self._receivers):
            self.remove(fd)
        self._poll.close()


@dataclass(slots=True)
class _Pending:
    reply: PendingReply
    first_row: int
    num_rows: int


class LaneTransport:
    """A connected lane to one replica. `rows` is where the coordinator's routed rows lie."""

    lane = "shm"

    def __init__(
        self,
        replica_id: str,
        doorbell: socket.socket,
        rows: RowsPool,
        replies: SharedRows,
        doorbells: LaneDoorbells,
        counters: WireCounters,
    ) -> None:
        self.closed = asyncio.Event()
        self.reason = ""
        self._replica_id = replica_id
        self._doorbell = doorbell
        self._rows = rows
        self._replies = replies
        self._space = RowSpace(replies.num_rows)
        self._doorbells = doorbells
        self._counters = counters
        self._pending: dict[int, _Pending] = {}
        self._sequence = 0
        self._row_bytes = region_bytes(1, replies.width)
        self._watch: asyncio.Task[None] | None = None
        doorbells.add(doorbell.fileno(), self._receive)

    def forward(self, request: ExpertRequest) -> PendingReply:
        """See ExpertTransport. Rows that are not in shared memory, or for which there is no room, are a failure."""
        reply = PendingReply()
        if self.closed.is_set():
            reply.end(TransportError(self.reason))
            return reply
        num_rows = request.num_rows
        base = self._rows.region.place(request.x_ND)
        first_reply = None if base is None else self._space.take(num_rows)
        if base is None or first_reply is None or len(request.parts) > MAX_SEGMENTS:
            reply.end(ExpertReply(pb.STATUS_OVERLOADED, f"no room for {num_rows} rows in shared memory"))
            return reply
        self._sequence += 1
        frame = LaneRequest(
            self._sequence,
            request.layer_id,
            request.map_epoch,
            request.deadline_unix_us,
            first_reply,
            tuple([Segment(part.expert_id, base + part.rows.start, part.num_rows) for part in request.parts]),
        ).pack()
        self._pending[self._sequence] = _Pending(reply, first_reply, num_rows)
        self._counters.messages += 1
        self._counters.lane_messages += 1
        self._counters.bytes_sent += len(frame) + num_rows * self._row_bytes
        try:
            self._doorbell.send(frame)
        except OSError as error:
            self._end(f"the doorbell is broken: {error}")
        return reply

    def guard(self, watch: Coroutine[None, None, str]) -> None:
        """Ends the lane with the reason that `watch` returns: a frozen process keeps its doorbell open."""
        self._watch = asyncio.create_task(self._guard(watch))

    async def close(self) -> None:
        """See ExpertTransport."""
        self._end("closed here")
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    async def _guard(self, watch: Coroutine[None, None, str]) -> None:
        self._end(await watch)

    def _receive(self) -> None:
        try:
            data = self._doorbell.recv(MAX_FRAME_BYTES)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            return self._end(f"the doorbell is broken: {error}")
        if not data:
            return self._end("the replica's process is gone")
        try:
            self._resolve(LaneReply.unpack(data), len(data))
        except CodecError as error:
            self._counters.corrupt_replies += 1
            self._end(f"the replica speaks another language: {error.detail}")

    def _resolve(self, answer: LaneReply, num_bytes: int) -> None:
        pending = self._pending.pop(answer.sequence, None)
        if pending is None:
            raise CodecError(pb.STATUS_CORRUPT, f"an answer to message {answer.sequence}, which was not sent")
        output, stop = None, pending.first_row + pending.num_rows
        if answer.status == pb.STATUS_OK:
            num_bytes += pending.num_rows * self._row_bytes
            output = self._replies.tensor[pending.first_row : stop]
        self._counters.bytes_received += num_bytes
        self._counters.late_replies += pending.reply.done()
        pending.reply.end(ExpertReply(answer.status, answer.detail, output, answer.compute_us, answer.queue_us))
        self._space.free(pending.first_row)

    def _end(self, reason: str) -> None:
        if self.closed.is_set():
            return
        self.reason = reason
        self.closed.set()
        self._doorbells.remove(self._doorbell.fileno())
        self._doorbell.close()
        self._replies.close()
        pending, self._pending = self._pending, {}
        for one in pending.values():
            one.reply.end(TransportError(reason))


@dataclass(frozen=True, slots=True)
class LaneMemory:
    """What a coordinator needs to use lanes: its rows, its doorbells, and how many answers a replica has room for."""

    rows: RowsPool
    doorbells: LaneDoorbells
    num_replies: int

    @classmethod
    def create(cls, num_rows: int, width: int, num_replies: int) -> "LaneMemory":
        """Inside a running event loop. Raises RegionError."""
        return cls(RowsPool(SharedRows.create(num_rows, width)), LaneDoorbells(), num_replies)

    async def connect(
        self, replica_id: str, endpoint: str, ticket: bytes, counters: WireCounters, timeout_s: float
    ) -> LaneTransport:
        """Opens the lane that a replica offers. Raises TransportError."""
        doorbell = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        replies: SharedRows | None = None
        try:
            replies = SharedRows.create(self.num_replies, self.rows.region.width)
            async with asyncio.timeout(timeout_s):
                doorbell.connect(f"\0{endpoint}")
                region = self.rows.region
                hello = Hello(ticket, region.width, region.num_rows, replies.num_rows)
                socket.send_fds(doorbell, [hello.pack()], [region.fd, replies.fd])
                answer = await asyncio.get_running_loop().sock_recv(doorbell, MAX_FRAME_BYTES)
            if not is_welcome(answer):
                raise TransportError("the replica closed the lane" if not answer else "not a welcome")
        except (OSError, TimeoutError, TransportError) as error:
            doorbell.close()
            if replies is not None:
                replies.close()
            said = "no welcome in time" if isinstance(error, TimeoutError) else str(error)
            raise TransportError(f"lane to {replica_id}: {said}") from None
        return LaneTransport(replica_id, doorbell, self.rows, replies, self.doorbells, counters)

    def close(self) -> None:
        self.doorbells.close()
        self.rows.region.close()


__all__ = ["LaneDoorbells", "LaneMemory", "LaneTransport", "RegionError"]
