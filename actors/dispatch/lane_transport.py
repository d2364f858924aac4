"""The coordinator's end of the same-node lane: a frame over a Unix socket, rows in memory that both sides see.

The socket is the doorbell and the death notice: its end means that the replica's process is gone, and comes at
once. A reply is read where somebody waits for it (`LaneDoorbells.wait`, without the event loop) or, when nobody
does, by the event loop. The frames are `protos.lane`'s, the replica's end is `actors.expert.lane_server`.
"""

import asyncio
import logging
import select
import socket
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass

import torch

from actors.dispatch.transport import ExpertReply, ExpertRequest, PendingReply, TransportError, WireCounters
from actors.machine import same_user
from actors.shared_rows import RegionError, RowSpace, RowsPool, SharedRows
from protos import expert_pb2 as pb
from protos.codec import CodecError
from protos.lane import MAX_FRAME_BYTES, MAX_SEGMENTS, Hello, LaneReply, LaneRequest, Segment, is_welcome, region_bytes

LOG = logging.getLogger(__name__)

_OK = pb.STATUS_OK


class LaneDoorbells:
    """All lanes of one coordinator, for whoever wants to wait for replies without a turn of the event loop."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._receivers: dict[int, Callable[[], None]] = {}
        self._loop = asyncio.get_running_loop()

    def add(self, fd: int, receive: Callable[[], None]) -> None:
        """`receive` is called when `fd` can be read. Raises OSError or ValueError, and forgets `fd`, if it cannot."""
        self._poll.register(fd, select.EPOLLIN)
        self._receivers[fd] = receive
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
    """`copied` are rows that were not in shared memory: their copy there, to be given back."""

    reply: PendingReply
    first_row: int
    num_rows: int
    copied: torch.Tensor | None


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
        self.incarnation = ""
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
        self._on_close: Callable[[], Awaitable[None]] | None = None
        doorbells.add(doorbell.fileno(), self._receive)

    def forward(self, request: ExpertRequest) -> PendingReply:
        """See ExpertTransport. Where there is no room in shared memory now, the replica is called overloaded.

        Raises ValueError for rows of another width.
        """
        reply = PendingReply()
        if self.closed.is_set():
            reply.end(TransportError(self.reason))
            return reply
        num_rows = request.num_rows
        segments, copied = self._place(request)
        first_reply = self._space.take(num_rows) if segments else None
        if first_reply is None or len(segments) > MAX_SEGMENTS:
            self._give_back(first_reply, copied)
            reply.end(ExpertReply(pb.STATUS_OVERLOADED, f"no room for {num_rows} rows in shared memory"))
            return reply
        self._sequence += 1
        crc = self._rows.region.checksum(*[one[1:] for one in segments])
        frame = LaneRequest(
            self._sequence, request.layer_id, request.map_epoch, request.deadline_unix_us, first_reply, segments, crc
        ).pack()
        self._pending[self._sequence] = _Pending(reply, first_reply, num_rows, copied)
        self._counters.messages += 1
        self._counters.lane_messages += 1
        self._counters.bytes_sent += len(frame) + num_rows * self._row_bytes
        self._ring(frame)
        return reply

    def guard(self, watch: Callable[[], Coroutine[None, None, str]], on_close: Callable[[], Awaitable[None]]) -> None:
        """Ends the lane with the reason that `watch` returns: a frozen process keeps its doorbell open.

        `on_close`, which gives back what `watch` needs, is awaited by `close`.
        """
        self._on_close = on_close
        self._watch = asyncio.create_task(self._guard(watch))

    async def close(self) -> None:
        """See ExpertTransport."""
        self._end("closed here")
        on_close, self._on_close = self._on_close, None
        try:
            if self._watch is not None:
                self._watch.cancel()
                await asyncio.gather(self._watch, return_exceptions=True)
        finally:
            if on_close is not None:
                await on_close()

    async def _guard(self, watch: Callable[[], Coroutine[None, None, str]]) -> None:
        reason = "nobody watches the replica any more"
        try:
            reason = await watch()
        finally:
            self._end(reason)

    def _place(self, request: ExpertRequest) -> tuple[tuple[Segment, ...], torch.Tensor | None]:
        """Where the rows lie in shared memory, and the copy of those that did not; no segments without room."""
        base = self._rows.region.place(request.x_ND)
        if base is not None:
            return tuple(
                [Segment(expert, base + rows.start, rows.stop - rows.start) for expert, rows in request.parts]
            ), None
        if request.x_ND.shape[1:] != (self._replies.width,):
            raise ValueError(
                f"rows of shape {tuple(request.x_ND.shape)}, this lane's have {self._replies.width} elements"
            )
        copied = self._rows.take(request.num_rows)
        if copied is None:
            return (), None
        copied.copy_(request.x_MD)
        at = self._rows.region.place(copied)
        assert at is not None, "a copy that lies elsewhere"
        segments = []
        for part in request.parts:
            segments.append(Segment(part.expert_id, at, part.num_rows))
            at += part.num_rows
        return tuple(segments), copied

    def _ring(self, frame: bytes) -> None:
        try:
            self._doorbell.send(frame)
        except BlockingIOError:  # the replica is at a long computation, and has not read very many frames
            pending = self._pending.pop(self._sequence)
            self._give_back(pending.first_row, pending.copied)
            pending.reply.end(ExpertReply(pb.STATUS_OVERLOADED, "the replica reads no frames"))
        except OSError as error:
            self._end(f"the doorbell is broken: {error}")

    def _give_back(self, first_reply: int | None, copied: torch.Tensor | None) -> None:
        if first_reply is not None:
            self._space.free(first_reply)
        if copied is not None:
            self._rows.free(copied)

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
        _, status, compute_us, queue_us, detail, crc, tokens = answer
        output = None
        if status == _OK:
            first, count = pending.first_row, pending.num_rows
            num_bytes += count * self._row_bytes
            if self._replies.checksum((first, count)) == crc:
                output = self._replies.tensor[first : first + count]
            else:
                status, detail = pb.STATUS_CORRUPT, "the answers are damaged: their CRC-32C is another"
        counters = self._counters
        counters.bytes_received += num_bytes
        if output is None or pending.reply.done():
            late = pending.reply.done()
            counters.late_replies += late
            counters.corrupt_replies += status == pb.STATUS_CORRUPT and not late
        try:
            reply = ExpertReply(status, detail, output, compute_us, queue_us, inflight_tokens=tokens)
            pending.reply.end(reply)
        finally:
            self._give_back(pending.first_row, pending.copied)

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
            self._give_back(one.first_row, one.copied)


@dataclass(frozen=True, slots=True)
class LaneMemory:
    """What a coordinator needs to use lanes: its rows, its doorbells, and how many answers a replica has room for."""

    rows: RowsPool
    doorbells: LaneDoorbells
    num_replies: int

    @classmethod
    def create(cls, num_rows: int, width: int, num_replies: int) -> "LaneMemory":
        """Inside a running event loop. Raises RegionError."""
        region = SharedRows.create(num_rows, width)
        try:
            return cls(RowsPool(region), LaneDoorbells(), num_replies)
        except OSError as error:
            region.close()
            raise RegionError(f"no doorbells: {error}") from None

    async def connect(
        self, replica_id: str, endpoint: str, ticket: bytes, counters: WireCounters, timeout_s: float
    ) -> LaneTransport:
        """Opens the lane that a replica offers. Raises TransportError."""
        doorbell: socket.socket | None = None
        replies: SharedRows | None = None
        try:
            doorbell = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            replies = SharedRows.create(self.num_replies, self.rows.region.width)
            await self._greet(doorbell, endpoint, ticket, replies, timeout_s)
            replies.unshare()  # the replica has it
            return LaneTransport(replica_id, doorbell, self.rows, replies, self.doorbells, counters)
        except BaseException as error:  # a cancelled one gives everything back, too
            if doorbell is not None:
                doorbell.close()
            if replies is not None:
                replies.close()
            if isinstance(error, OSError | ValueError | TransportError):
                raise TransportError(f"lane to {replica_id}: {error}") from None
            raise

    async def _greet(
        self, doorbell: socket.socket, endpoint: str, ticket: bytes, replies: SharedRows, timeout_s: float
    ) -> None:
        region = self.rows.region
        hello = Hello(ticket, region.width, region.num_rows, replies.num_rows)
        doorbell.connect(f"\0{endpoint}")
        if not same_user(doorbell):
            raise TransportError("the doorbell is another user's")
        socket.send_fds(doorbell, [hello.pack()], [region.fd, replies.fd])
        try:
            async with asyncio.timeout(timeout_s):
                answer = await asyncio.get_running_loop().sock_recv(doorbell, MAX_FRAME_BYTES)
        except TimeoutError:
            raise TransportError("no welcome in time") from None
        if not is_welcome(answer):
            raise TransportError("not a welcome" if answer else "the replica closed the lane")

    def close(self) -> None:
        self.doorbells.close()
        self.rows.region.unshare()  # rounds that end later give their rows back


__all__ = ["LaneDoorbells", "LaneMemory", "LaneTransport", "RegionError"]
