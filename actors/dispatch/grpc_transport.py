"""Rows over gRPC: the lane that always works, and the one between machines.

Small messages share one Forward stream; large ones take turns on several channels of their own connections, so
that the bytes of one are under way while another's are still being copied. A damaged message puts every
unanswered one of its stream in doubt. Who may be asked at all is agreed on in `actors.dispatch.attach`.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import torch

from actors.dispatch.transport import ExpertReply, ExpertRequest, PendingReply, TransportError, WireCounters
from protos import expert_pb2 as pb
from protos.codec import CodecError, encode_request, reply_seed, restore, split_reply
from protos.frames import Frame
from protos.limits import MAX_MESSAGE_BYTES

LOG = logging.getLogger(__name__)

METHOD = "/octavo.ExpertService/"
LARGE_BYTES = 256 * 1024
"""Messages from this size on are spread over the channels."""

_WIRE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GrpcTransport:
    """Streams over channels that are connected; the first is the one for small messages."""

    lane = "grpc"

    def __init__(self, replica_id: str, channels: Sequence[grpc.aio.Channel], counters: WireCounters) -> None:
        self.incarnation = ""
        self.closed = asyncio.Event()
        self.reason = ""
        self._replica_id = replica_id
        self._channels = channels
        self._counters = counters
        self._streams: list[_Stream] = []
        self._turn = 0

    async def open(self, timeout_s: float) -> None:
        """Opens a stream on every channel. Raises TransportError."""
        try:
            async with asyncio.timeout(timeout_s):
                for channel in self._channels:
                    forward: Any = channel.stream_stream(METHOD + "Forward")  # bytes in, bytes out
                    call = forward(wait_for_ready=True)
                    await call.wait_for_connection()
                    self._streams.append(_Stream(self._replica_id, call, self._counters, self._end))
        except TimeoutError:
            raise TransportError(f"no stream within {timeout_s:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise TransportError(said(error)) from None

    def forward(self, request: ExpertRequest) -> PendingReply:
        """See ExpertTransport. Raises ValueError for rows that do not fit one message."""
        reply = PendingReply()
        if self.closed.is_set():
            reply.end(TransportError(self.reason))
            return reply
        hidden_MD = request.x_MD if request.entries is None else request.entries.x_UD
        if hidden_MD.nbytes < LARGE_BYTES or len(self._streams) == 1:
            stream = self._streams[0]
        else:
            self._turn = self._turn % (len(self._streams) - 1) + 1
            stream = self._streams[self._turn]
        stream.send(request, hidden_MD, reply)
        return reply

    async def close(self) -> None:
        """See ExpertTransport."""
        self._end("closed here")
        channels, self._channels = self._channels, ()
        await asyncio.gather(*(channel.close() for channel in channels))
        await asyncio.gather(*(stream.join() for stream in self._streams))

    def _end(self, reason: str) -> None:
        if self.closed.is_set():
            return
        self.reason = reason
        self.closed.set()
        for stream in self._streams:
            stream.end(reason)


@dataclass(slots=True)
class _Pending:
    request: pb.ForwardRequest
    shape: torch.Size
    dtype: torch.dtype
    reply: PendingReply


class _Stream:
    """One Forward call: a writer task, a reader task, and what is unanswered by sequence number."""

    def __init__(
        self,
        replica_id: str,
        call: grpc.aio.StreamStreamCall[bytes, bytes],
        counters: WireCounters,
        on_end: Callable[[str], None],
    ) -> None:
        self._replica_id = replica_id
        self._counters = counters
        self._on_end = on_end
        self._pending: dict[int, _Pending] = {}
        self._sequence = 0
        self._outbox: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._tasks = [asyncio.create_task(self._read(call)), asyncio.create_task(self._write(call))]

    def send(self, request: ExpertRequest, hidden_MD: torch.Tensor, reply: PendingReply) -> None:
        self._sequence += 1
        header = pb.ForwardRequest(
            sequence=self._sequence,
            layer_id=request.layer_id,
            expert_ids=[part.expert_id for part in request.parts],
            expert_rows=[part.num_rows for part in request.parts],
            map_epoch=request.map_epoch,
            deadline_unix_us=request.deadline_unix_us,
        )
        if request.entries is not None:
            header.merge.entries = request.entries.entries_M.astype("<u4").tobytes()
            header.merge.weights = request.entries.weights_M.astype("<f4").tobytes()
            self._counters.merged_messages += 1
        message = encode_request(header, hidden_MD)
        if len(message) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(message)} bytes, at most {MAX_MESSAGE_BYTES} can be sent")
        self._pending[self._sequence] = _Pending(header, hidden_MD.shape, hidden_MD.dtype, reply)
        self._outbox.append(message)
        self._wake.set()
        self._counters.messages += 1
        self._counters.bytes_sent += len(message)

    def end(self, reason: str) -> None:
        """Fails what is unanswered, and stops."""
        pending, self._pending = self._pending, {}
        self._outbox.clear()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        for one in pending.values():
            one.reply.end(TransportError(reason))

    async def join(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        try:
            while True:
                data: object = await call.read()
                if not isinstance(data, bytes):
                    return self._on_end("the replica ended the stream")
                self._receive(data)
        except grpc.aio.AioRpcError as error:
            self._on_end(said(error))
        finally:
            self._on_end("reading stopped")

    async def _write(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        try:
            while True:
                while self._outbox:
                    await call.write(self._outbox.popleft())
                self._wake.clear()
                await self._wake.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._on_end(said(error) if isinstance(error, grpc.aio.AioRpcError) else "the stream is over")
        finally:
            self._on_end("writing stopped")

    def _receive(self, data: bytes) -> None:
        self._counters.bytes_received += len(data)
        try:
            header, frame = split_reply(data)
        except CodecError as error:
            return self._distrust(error.detail)
        pending = self._pending.pop(header.sequence, None)
        if header.sequence == 0:
            self._distrust(f"the replica could not read a message: {header.detail}")
        elif pending is not None and not pending.reply.done():
            self._resolve(pending, header, frame)
        elif header.status == pb.STATUS_CORRUPT or header.sequence > self._sequence:
            self._distrust(f"an answer to message {header.sequence}, which is not waited for: {header.detail}")
        else:
            self._counters.late_replies += 1
        return None

    def _resolve(self, pending: _Pending, header: pb.ForwardReply, frame: Frame[pb.ForwardReply] | None) -> None:
        status, output, malformed = header.status, None, False
        detail = header.detail
        if (status == pb.STATUS_OK) != (frame is not None) or status not in pb.Status.values():
            status, detail = pb.STATUS_CORRUPT, f"status {status} {'with' if frame else 'without'} an output"
        elif status == pb.STATUS_OK:
            try:
                output = _output(pending, frame)
            except CodecError as error:
                status, detail = error.status, error.detail
                malformed = frame is not None and status == pb.STATUS_INVALID and _came_whole(pending, frame)
        times = header.compute_us, header.queue_us
        pending.reply.end(ExpertReply(status, detail, output, *times, malformed, header.inflight_tokens))
        if status == pb.STATUS_CORRUPT:
            self._distrust(detail)

    def _distrust(self, detail: str) -> None:
        """A damaged message may have been any of those that are unanswered: all of them must be asked for again."""
        self._counters.corrupt_replies += 1
        LOG.warning("%s: damaged message: %s", self._replica_id, detail)
        for pending in list(self._pending.values()):
            pending.reply.end(ExpertReply(pb.STATUS_CORRUPT, detail))


def _output(pending: _Pending, frame: Frame[pb.ForwardReply] | None) -> torch.Tensor:
    assert frame is not None, "a reply without an output is never OK"
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


def _came_whole(pending: _Pending, frame: Frame[pb.ForwardReply]) -> bool:
    """Whether an answer of the wrong shape is what the replica sent: its checksum covers the shape."""
    try:
        rows, width = frame.claim.shape
        restore(
            frame.claim,
            frame.payload,
            max_rows=rows,
            width=width,
            dtypes=_WIRE_DTYPES,
            seed=reply_seed(pending.request),
        )
    except (CodecError, ValueError):
        return False
    return True


def said(error: grpc.aio.AioRpcError) -> str:
    """A gRPC error in a line."""
    return f"{error.code().name}: {error.details()}"
