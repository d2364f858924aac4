"""The seam between a coordinator and one replica: rows go out, rows come back, by whatever lane they agreed on.

`ExpertTransport` is the seam, `GrpcTransport` the lane that always works. A transport lives as long as one
connection: when that breaks, everything unanswered fails at once and the transport is done. Making a new one
is `actors.dispatch.replica_link`'s work, sending the rows somewhere else `actors.dispatch.remote_experts`'s.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import torch

from actors.channels import ChannelError, WireCredentials, open_channel
from actors.machine import machine_id
from cluster.expert_map import ReplicaInfo
from protos import expert_pb2 as pb
from protos.codec import MAX_MESSAGE_BYTES, CodecError, encode_request, reply_seed, restore, split_reply
from protos.frames import Frame

LOG = logging.getLogger(__name__)

LANES = ("grpc",)
"""The lanes this side can use, preferred first."""

_METHOD = "/octavo.ExpertService/"
_INFO_TIMEOUT_S = 5.0


class TransportError(Exception):
    """A connection that could not be made, or broke; the message says why."""


@dataclass(frozen=True, slots=True)
class ExpertRequest:
    """Rows (M, D) for one expert in one layer. The deadline is absolute, microseconds since 1970."""

    layer_id: int
    expert_id: int
    map_epoch: int
    deadline_unix_us: int
    hidden: torch.Tensor


@dataclass(frozen=True, slots=True)
class ExpertReply:
    """`output` (M, D) is there exactly when `status` is OK, with the request's shape and dtype."""

    status: pb.Status
    detail: str = ""
    output: torch.Tensor | None = None
    compute_us: int = 0
    queue_us: int = 0


@dataclass(slots=True)
class WireCounters:
    """What all transports of one coordinator did. Bytes are of serialised messages."""

    messages: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    late_replies: int = 0
    corrupt_replies: int = 0


class ExpertTransport(Protocol):
    """One connection to one replica."""

    @property
    def closed(self) -> asyncio.Event:
        """Set when the connection is over; `reason` says why."""
        ...

    @property
    def reason(self) -> str: ...

    async def connect(self, timeout_s: float) -> None:
        """Returns when the replica can be asked. Raises TransportError."""
        ...

    def forward(self, request: ExpertRequest) -> asyncio.Future[ExpertReply]:
        """Sends rows without waiting. The future fails with TransportError when the connection ends first; to
        cancel it is to ignore a late reply.
        """
        ...

    async def close(self) -> None:
        """Ends the connection; what is unanswered fails. May be called twice."""
        ...


OpenTransport = Callable[[ReplicaInfo, WireCounters], ExpertTransport]


def grpc_transports(credentials: WireCredentials) -> OpenTransport:
    """Makes GrpcTransports, not yet connected."""
    return lambda replica, counters: GrpcTransport(replica, credentials, counters)


@dataclass(slots=True)
class _Pending:
    request: pb.ForwardRequest
    shape: torch.Size
    dtype: torch.dtype
    reply: asyncio.Future[ExpertReply]


class GrpcTransport:
    """One Forward stream: a writer task, a reader task, and a future per sequence number."""

    def __init__(self, replica: ReplicaInfo, credentials: WireCredentials, counters: WireCounters) -> None:
        self.closed = asyncio.Event()
        self.reason = ""
        self._replica = replica
        self._credentials = credentials
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._channel: grpc.aio.Channel | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._pending: dict[int, _Pending] = {}
        self._sequence = 0
        self._outbox: deque[bytes] = deque()
        self._wake = asyncio.Event()

    async def connect(self, timeout_s: float) -> None:
        """Waits up to `timeout_s` for the replica to be ready, and checks that it is the one meant."""
        try:
            self._channel = open_channel(self._replica.address, self._credentials)
            await self._agree(self._channel, timeout_s)
            forward: Any = self._channel.stream_stream(_METHOD + "Forward")  # bytes in, bytes out
            call = forward(wait_for_ready=True)
            await call.wait_for_connection()
        except grpc.aio.AioRpcError as error:
            await self.close()
            raise TransportError(f"{self._replica.address}: {_said(error)}") from None
        except (ChannelError, TransportError) as error:
            await self.close()
            raise TransportError(f"{self._replica.address}: {error}") from None
        self._tasks = [asyncio.create_task(self._read(call)), asyncio.create_task(self._write(call))]

    def forward(self, request: ExpertRequest) -> asyncio.Future[ExpertReply]:
        """See ExpertTransport. Raises ValueError for rows that do not fit one message."""
        future: asyncio.Future[ExpertReply] = self._loop.create_future()
        if self.closed.is_set() or not self._tasks:
            future.set_exception(TransportError(self.reason or "not connected"))
            return future
        self._sequence += 1
        header = pb.ForwardRequest(
            sequence=self._sequence,
            layer_id=request.layer_id,
            expert_id=request.expert_id,
            map_epoch=request.map_epoch,
            deadline_unix_us=request.deadline_unix_us,
        )
        message = encode_request(header, request.hidden)
        if len(message) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(message)} bytes, at most {MAX_MESSAGE_BYTES} can be sent")
        self._pending[self._sequence] = _Pending(header, request.hidden.shape, request.hidden.dtype, future)
        self._outbox.append(message)
        self._wake.set()
        self._counters.messages += 1
        self._counters.bytes_sent += len(message)
        return future

    async def close(self) -> None:
        """See ExpertTransport."""
        self._end("closed here")
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _agree(self, channel: grpc.aio.Channel, timeout_s: float) -> None:
        """Attach answers only when the replica is ready. Raises TransportError for one that the map does not mean."""
        attach: Any = channel.unary_unary(
            _METHOD + "Attach", pb.AttachRequest.SerializeToString, pb.AttachReply.FromString
        )
        about: Any = channel.unary_unary(_METHOD + "Info", pb.InfoRequest.SerializeToString, pb.InfoReply.FromString)
        wanted = pb.AttachRequest(machine_id=machine_id(), lanes=LANES)
        agreed = await attach(wanted, timeout=timeout_s, wait_for_ready=True)
        if agreed.lane not in LANES:
            raise TransportError(f"offers lane {agreed.lane!r}, known here: {', '.join(LANES)}")
        info = await about(pb.InfoRequest(), timeout=_INFO_TIMEOUT_S)
        for name in ("replica_id", "numerics_domain"):
            meant, found = getattr(self._replica, name), getattr(info, name)
            if meant != found:
                raise TransportError(f"{name} is {found!r}, the map says {meant!r}")

    async def _read(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        try:
            while True:
                data: object = await call.read()
                if not isinstance(data, bytes):
                    return self._end("the replica ended the stream")
                self._receive(data)
        except grpc.aio.AioRpcError as error:
            self._end(_said(error))
        finally:
            self._end("reading stopped")

    async def _write(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        try:
            while True:
                while self._outbox:
                    await call.write(self._outbox.popleft())
                self._wake.clear()
                await self._wake.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._end(_said(error) if isinstance(error, grpc.aio.AioRpcError) else "the stream is over")
        finally:
            self._end("writing stopped")

    def _receive(self, data: bytes) -> None:
        self._counters.bytes_received += len(data)
        try:
            header, frame = split_reply(data)
        except CodecError as error:
            return self._distrust(error.detail)
        pending = self._pending.pop(header.sequence, None)
        if header.sequence == 0:
            self._distrust(f"the replica could not read a message: {header.detail}")
        elif pending is None or pending.reply.done():
            self._counters.late_replies += 1
        else:
            self._resolve(pending, header, frame)
        return None

    def _resolve(self, pending: _Pending, header: pb.ForwardReply, frame: Frame[pb.ForwardReply] | None) -> None:
        status, output = header.status, None
        detail = header.detail
        if status == pb.STATUS_OK:
            try:
                output = _output(pending, frame)
            except CodecError as error:
                status, detail = error.status, error.detail
        pending.reply.set_result(ExpertReply(status, detail, output, header.compute_us, header.queue_us))
        if status == pb.STATUS_CORRUPT:
            self._distrust(detail)

    def _distrust(self, detail: str) -> None:
        """A damaged message may have been any of those that are unanswered: all of them must be asked for again."""
        self._counters.corrupt_replies += 1
        LOG.warning("%s: damaged message: %s", self._replica.replica_id, detail)
        for pending in self._pending.values():
            if not pending.reply.done():
                pending.reply.set_result(ExpertReply(pb.STATUS_CORRUPT, detail))

    def _end(self, reason: str) -> None:
        if self.closed.is_set():
            return
        self.reason = reason
        self.closed.set()
        for pending in self._pending.values():
            if not pending.reply.done():
                pending.reply.set_exception(TransportError(reason))
        self._pending.clear()
        self._outbox.clear()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()


def _output(pending: _Pending, frame: Frame[pb.ForwardReply] | None) -> torch.Tensor:
    if frame is None:
        raise CodecError(pb.STATUS_INVALID, "the reply has no output")
    rows, width = pending.shape
    output = restore(
        frame.claim,
        frame.payload,
        max_rows=rows,
        width=width,
        dtypes=(pending.dtype,),
        seed=reply_seed(pending.request),
    )
    if len(output) != rows:
        raise CodecError(pb.STATUS_INVALID, f"{len(output)} rows came back for {rows}")
    return output


def _said(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"
