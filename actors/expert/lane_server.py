"""The replica's end of the same-node lane: an abstract Unix socket, watched by the compute thread itself.

A coordinator that shows a ticket, which it got over authenticated gRPC, hands over two regions of shared memory; from
then on a frame says where rows lie and where the answers go. Everything but `offer` and `close` happens in the
compute thread. A peer that is gone, or writes nonsense, loses its lane and nothing else. The frames are
`protos.lane`'s, the coordinator's end is `actors.dispatch.lane_transport`.
"""

import errno
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from actors.expert.compute_thread import ComputeThread
from actors.expert.desk import Admitted, Desk, Outcome, Refused
from actors.machine import machine_id, same_user
from actors.shared_rows import SharedRows, supported
from protos import expert_pb2 as pb
from protos.codec import CodecError
from protos.lane import MAX_FRAME_BYTES, TICKET_BYTES, Hello, LaneReply, LaneRequest, welcome

LOG = logging.getLogger(__name__)

MAX_LANES = 64
MAX_TICKETS = 64
TICKET_S = 60.0
"""How long a ticket is good: a hello may have to wait for a long computation."""

HELLO_S = 10.0
"""How long a peer that was let in may take to say hello, when others want its place."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Where to call, and what to show there."""

    endpoint: str
    ticket: bytes


class LaneServer:
    """Lanes into one replica. `watch` begins to listen, once the compute thread may be used."""

    def __init__(
        self,
        desk: Desk,
        compute: ComputeThread,
        clock: Callable[[], float] = time.monotonic,
        *,
        ticket_s: float = TICKET_S,
    ) -> None:
        self._desk = desk
        self._compute = compute
        self._clock = clock
        self._ticket_s = ticket_s
        self._tickets: dict[bytes, float] = {}
        self._lanes: set[_Lane] = set()
        self._endpoint = f"octavo-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener: socket.socket | None = None
        self._paused = False

    def watch(self) -> None:
        """Listens, where the system has what lanes need."""
        if not supported():
            return
        listener: socket.socket | None = None
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            listener.bind(f"\0{self._endpoint}")
            listener.listen(MAX_LANES)
        except OSError as error:
            LOG.warning("no same-node lane: %s", error)
            if listener is not None:
                listener.close()
            return
        self._listener = listener
        self._compute.watch(listener.fileno(), self._accept)

    def offer(self, peer_machine: str) -> Offer | None:
        """A lane for a coordinator on `peer_machine`, None unless that is this machine."""
        if self._listener is None or not peer_machine or peer_machine != machine_id():
            return None
        if self._paused:
            self._paused = False
            self._compute.watch(self._listener.fileno(), self._accept)
        now_s = self._clock()
        for ticket, until_s in list(self._tickets.items()):
            if until_s < now_s:
                self._tickets.pop(ticket, None)
        if len(self._tickets) >= MAX_TICKETS:
            return None
        ticket = secrets.token_bytes(TICKET_BYTES)
        self._tickets[ticket] = now_s + self._ticket_s
        return Offer(self._endpoint, ticket)

    def close(self) -> None:
        """Ends every lane; call it when the compute thread has ended."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.end_all("closed here")

    def end_all(self, reason: str) -> None:
        """Ends every lane: who waits for answers hears of it at once."""
        for lane in list(self._lanes):
            lane.end(reason)

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            doorbell, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                LOG.warning("no more lanes for now: %s", error)
                self._compute.unwatch(self._listener.fileno())  # it would stay readable, and this thread would spin
                self._paused = True  # until somebody asks for a lane again
            return  # otherwise: gone before it was let in
        now_s = self._clock()
        if len(self._lanes) >= MAX_LANES:
            self._clear_out(now_s - HELLO_S)
        if len(self._lanes) >= MAX_LANES or not same_user(doorbell):
            doorbell.close()
            return
        doorbell.setblocking(False)
        lane = _Lane(doorbell, self._desk, self._compute, self._redeem, self._lanes.discard, now_s)
        self._lanes.add(lane)
        self._compute.watch(doorbell.fileno(), lane.receive)

    def _clear_out(self, before_s: float) -> None:
        """Ends lanes that were let in before that time and have not said hello."""
        for lane in list(self._lanes):
            if not lane.greeted and lane.since_s < before_s:
                lane.end("no hello")

    def _redeem(self, ticket: bytes) -> bool:
        until_s = self._tickets.pop(ticket, None)
        return until_s is not None and until_s >= self._clock()


class _Lane:
    """One coordinator's lane, from its hello on."""

    def __init__(
        self,
        doorbell: socket.socket,
        desk: Desk,
        compute: ComputeThread,
        redeem: Callable[[bytes], bool],
        on_end: Callable[["_Lane"], None],
        since_s: float,
    ) -> None:
        self.since_s = since_s
        self._doorbell = doorbell
        self._desk = desk
        self._compute = compute
        self._redeem = redeem
        self._on_end = on_end
        self._rows: SharedRows | None = None
        self._replies: SharedRows | None = None
        self._gone = False

    @property
    def greeted(self) -> bool:
        """Whether its hello was welcome."""
        return self._rows is not None

    def receive(self) -> None:
        """Reads one frame; the socket is readable."""
        try:
            if self._rows is None or self._replies is None:
                self._greet()
                return None
            frame = self._doorbell.recv(MAX_FRAME_BYTES)
        except (BlockingIOError, InterruptedError):
            return None
        except (OSError, CodecError) as error:
            return self.end(f"{type(error).__name__}: {error}")
        if not frame:
            return self.end("the coordinator is gone")
        self._take_in(frame, self._rows, self._replies)
        return None

    def end(self, reason: str) -> None:
        """Closes the lane; what it has queued is dropped."""
        if self._gone:
            return
        self._gone = True
        LOG.info("a lane ends: %s", reason)
        self._compute.unwatch(self._doorbell.fileno())
        self._doorbell.close()
        self._rows = self._replies = None  # the memory goes with the last job that reads it
        self._on_end(self)

    def _greet(self) -> None:
        """Reads the hello, with the two regions. Raises CodecError or OSError for one that is not welcome."""
        frame, fds, _, _ = socket.recv_fds(self._doorbell, MAX_FRAME_BYTES, 2)
        try:
            hello = Hello.unpack(frame)
            if not self._redeem(hello.ticket):
                raise CodecError(pb.STATUS_INVALID, "a wrong ticket")
            if hello.width != self._desk.replica.hidden_size or len(fds) != 2:
                raise CodecError(pb.STATUS_INVALID, f"{len(fds)} regions of width {hello.width}")
            rows = SharedRows.adopt(fds.pop(0), hello.num_rows, hello.width)
            replies = SharedRows.adopt(fds.pop(0), hello.num_replies, hello.width)
        finally:
            for fd in fds:
                os.close(fd)
        self._doorbell.send(welcome())
        self._rows, self._replies = rows, replies

    def _take_in(self, frame: bytes, rows: SharedRows, replies: SharedRows) -> None:
        sequence = 0
        try:
            request = LaneRequest.unpack(frame, num_rows=rows.num_rows, num_replies=replies.num_rows)
            sequence = request.sequence
            experts, _, counts = zip(*request.segments, strict=True)
            admitted = self._desk.admit(
                request.layer_id,
                experts,
                counts,
                map_epoch=request.map_epoch,
                deadline_unix_us=request.deadline_unix_us,
            )
        except (Refused, CodecError) as error:
            self._desk.replica.refuse()
            sequence = sequence or getattr(error, "sequence", 0)
            if sequence == 0:
                return self.end(error.detail)
            return self._say(LaneReply(sequence, error.status, detail=error.detail))
        work = partial(self._run, request, admitted, rows, replies)
        self._compute.submit(work, request.deadline_unix_us)
        return None

    def _run(self, request: LaneRequest, admitted: Admitted, rows: SharedRows, replies: SharedRows) -> None:
        if self._gone:
            self._desk.finish(admitted, None)
            return
        outcome, crc = self._compute_rows(request, admitted, rows, replies)
        self._desk.finish(admitted, outcome)
        status, detail = outcome.status, outcome.detail
        tokens = self._desk.replica.inflight_tokens
        self._say(LaneReply(request.sequence, status, outcome.compute_us, outcome.queue_us, detail, crc, tokens))

    def _compute_rows(
        self, request: LaneRequest, admitted: Admitted, rows: SharedRows, replies: SharedRows
    ) -> tuple[Outcome, int]:
        """What became of the rows, and the checksum of the answers, which are in their place if all is well."""
        places = [segment[1:] for segment in request.segments]
        if rows.checksum(*places) != request.rows_crc:
            # Damaged, or long given up: this process was frozen, and their place was used again.
            return Outcome(pb.STATUS_CORRUPT, "the rows are not those that were sent: their CRC-32C is another"), 0
        x_MD = _adjacent(request, rows.tensor) if len(places) > 1 else rows.slice(*places[0])
        outcome = self._desk.compute(admitted, x_MD, partial(replies.put, request.reply_row))
        done = outcome.status == pb.STATUS_OK
        return outcome, replies.checksum((request.reply_row, admitted.total)) if done else 0

    def _say(self, reply: LaneReply) -> None:
        try:
            self._doorbell.send(reply.pack())
        except OSError as error:  # also when the peer has not read so many replies that no more fit
            self.end(f"{type(error).__name__}: {error}")


def _adjacent(request: LaneRequest, rows_RD: torch.Tensor) -> torch.Tensor:
    """The segments' rows one behind another: a view where they lie so."""
    first, at = request.segments[0].first_row, request.segments[0].first_row
    for segment in request.segments:
        if segment.first_row != at:
            return torch.cat([rows_RD[one.first_row : one.first_row + one.num_rows] for one in request.segments])
        at += segment.num_rows
    return rows_RD[first:at]
