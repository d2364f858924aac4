"""ExpertService: what an expert actor answers on its port.

Rows of a stream are checked, queued and computed one message at a time; replies may come in any order. A
message that is wrong gets an error for a reply, its stream goes on. The queue is bounded in tokens, and of a
peer that does not read its replies nothing more is read. The columns themselves are in
`actors.expert.replica`, the thread that runs them in `actors.expert.compute_thread`; who may call at all is decided
before, in `actors.channels`.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import torch

from actors.expert.compute_thread import ComputeThread
from actors.expert.replica import Column, ExpertReplica, state_name
from actors.expert.reply_stream import ReplyStream
from protos import expert_pb2 as pb
from protos.codec import CodecError, encode_reply, max_rows_for, request_seed, restore, split_request
from protos.frames import Frame

LOG = logging.getLogger(__name__)

SERVICE = "octavo.ExpertService"
WIRE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_MAX_DETAIL = 512

LoadColumn = Callable[[int, range], Awaitable[int]]
"""Loads one more expert's layers and returns the bytes of its weights; raises LoadError."""


class LoadError(Exception):
    """A column that this replica cannot load; the message says why."""


class Refused(Exception):
    """A request that is answered with `status` instead of rows."""

    def __init__(self, status: pb.Status, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


@dataclass(slots=True)
class _Work:
    request: pb.ForwardRequest
    hidden: torch.Tensor  # (M, D)
    column: Column
    stream: ReplyStream
    arrived_s: float


@dataclass(slots=True)
class _Outcome:
    reply: bytes
    status: pb.Status
    queue_us: int = 0
    compute_us: int = 0


class ExpertService:
    """Serves one replica. `wall_us` is the clock of deadlines, microseconds since 1970."""

    def __init__(
        self,
        replica: ExpertReplica,
        compute: ComputeThread,
        load_column: LoadColumn,
        *,
        max_queue_tokens: int,
        min_map_epoch: int = 0,
        wall_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._replica = replica
        self._compute = compute
        self._load_column = load_column
        self._max_queue_tokens = max_queue_tokens
        self._min_map_epoch = min_map_epoch
        self._wall_us = wall_us
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service. Forward's messages come as bytes: one that cannot be parsed must not end its stream."""
        unary = grpc.unary_unary_rpc_method_handler
        reply = pb.InfoReply.SerializeToString
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Forward": grpc.stream_stream_rpc_method_handler(self._forward),
            "Info": unary(self._info, pb.InfoRequest.FromString, reply),
            "Attach": unary(self._attach, pb.AttachRequest.FromString, pb.AttachReply.SerializeToString),
            "LoadColumn": unary(self._load, pb.LoadColumnRequest.FromString, pb.LoadColumnReply.SerializeToString),
            "Drain": unary(self._drain, pb.DrainRequest.FromString, pb.DrainReply.SerializeToString),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))

    async def drain(self, timeout_s: float) -> int:
        """Takes nothing new, waits for what is in flight, and returns the tokens still unanswered."""
        if self._replica.state != pb.REPLICA_STATE_FAILED:
            self._replica.state = pb.REPLICA_STATE_DRAINING
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            LOG.warning("%s: %d tokens still in flight", self._replica.replica_id, self._replica.inflight_tokens)
        return self._replica.inflight_tokens

    async def _forward(self, _requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        stream = ReplyStream()
        writer = asyncio.create_task(stream.write_to(context))
        try:
            while (data := await stream.read(context)) is not None:
                self._receive(data, stream)
                await stream.wait_for_room()
            stream.end()
            await writer
        finally:
            stream.gone = True  # what is queued for it is dropped unseen
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    def _receive(self, data: bytes, stream: ReplyStream) -> None:
        self._replica.counters.messages_total += 1
        arrived_s = time.monotonic()
        sequence = 0
        try:
            frame = split_request(data)
            sequence = frame.header.sequence
            column = self._admit(frame)
            hidden_MD = self._rows(frame)
        except (Refused, CodecError) as error:
            self._replica.counters.refused_total += 1
            stream.push(_refusal(sequence or getattr(error, "sequence", 0), error.status, error.detail))
            return
        work = _Work(frame.header, hidden_MD, column, stream, arrived_s)
        stream.unanswered += 1
        self._replica.inflight_tokens += len(hidden_MD)
        self._idle.clear()
        # By deadline: rows that were replayed here after a failure elsewhere are older, so they come first.
        self._compute.submit(partial(self._run, work), frame.header.deadline_unix_us)

    def _admit(self, frame: Frame[pb.ForwardRequest]) -> Column:
        """Checks all but the rows, cheapest first, and that there is room for them. Raises Refused."""
        request, replica = frame.header, self._replica
        if request.sequence == 0 or request.deadline_unix_us == 0:
            raise Refused(pb.STATUS_INVALID, "sequence and deadline_unix_us must not be 0")
        if replica.state == pb.REPLICA_STATE_DRAINING:
            raise Refused(pb.STATUS_DRAINING, "this replica is draining")
        if replica.state != pb.REPLICA_STATE_READY:
            raise Refused(pb.STATUS_NOT_HELD, f"this replica is {state_name(replica.state)}")
        if request.map_epoch < self._min_map_epoch:
            stale = f"map_epoch {request.map_epoch} is older than {self._min_map_epoch}"
            raise Refused(pb.STATUS_STALE_EPOCH, stale)
        column = replica.find(request.layer_id, request.expert_id)
        if column is None:
            where = f"expert {request.expert_id} in layer {request.layer_id}"
            raise Refused(pb.STATUS_NOT_HELD, f"this replica does not hold {where}")
        self._check_deadline(request)
        claimed = frame.claim.shape[0] if frame.claim.shape else 0
        if claimed <= self._max_queue_tokens < replica.inflight_tokens + claimed:
            room = self._max_queue_tokens - replica.inflight_tokens
            raise Refused(pb.STATUS_OVERLOADED, f"{claimed} rows, room for {room}")
        return column

    def _rows(self, frame: Frame[pb.ForwardRequest]) -> torch.Tensor:
        width = self._replica.hidden_size
        most = min(self._max_queue_tokens, max_rows_for(width, torch.float16))
        seed = request_seed(frame.header)
        hidden_MD = restore(frame.claim, frame.payload, max_rows=most, width=width, dtypes=WIRE_DTYPES, seed=seed)
        self._replica.map_epoch = max(self._replica.map_epoch, frame.header.map_epoch)
        return hidden_MD

    def _check_deadline(self, request: pb.ForwardRequest) -> None:
        late_us = self._wall_us() - request.deadline_unix_us
        if late_us >= 0:
            raise Refused(pb.STATUS_DEADLINE_EXCEEDED, f"expired {late_us / 1e3:.1f} ms ago")

    def _run(self, work: _Work) -> None:
        """In the compute thread."""
        outcome = None if work.stream.gone else self._outcome(work)
        self._loop.call_soon_threadsafe(self._finish, work, outcome)

    def _outcome(self, work: _Work) -> _Outcome:
        request = work.request
        started_s = time.monotonic()
        try:
            self._check_deadline(request)
            output_MD = self._compute_rows(work)
        except Refused as error:
            return _Outcome(_refusal(request.sequence, error.status, error.detail), error.status)
        except Exception as error:  # rows that a kernel chokes on must not take the others' replica down
            LOG.exception("expert %d, layer %d failed", request.expert_id, request.layer_id)
            reply = _refusal(request.sequence, pb.STATUS_INTERNAL, f"{type(error).__name__}: {error}")
            return _Outcome(reply, pb.STATUS_INTERNAL)
        queue_us = int((started_s - work.arrived_s) * 1e6)
        compute_us = int((time.monotonic() - started_s) * 1e6)
        header = pb.ForwardReply(
            sequence=request.sequence, status=pb.STATUS_OK, compute_us=compute_us, queue_us=queue_us
        )
        reply = encode_reply(header, output_MD, request)
        return _Outcome(reply, pb.STATUS_OK, queue_us, compute_us)

    def _compute_rows(self, work: _Work) -> torch.Tensor:
        with torch.inference_mode():
            output_MD = work.column.forward(work.request.layer_id, work.hidden)
            return output_MD.to("cpu", work.hidden.dtype)

    def _finish(self, work: _Work, outcome: _Outcome | None) -> None:
        replica, counters = self._replica, self._replica.counters
        replica.inflight_tokens -= len(work.hidden)
        work.stream.unanswered -= 1
        if replica.inflight_tokens == 0:
            self._idle.set()
        if outcome is None:
            return
        if outcome.status == pb.STATUS_OK:
            counters.tokens_total += len(work.hidden)
            counters.queue_us_total += outcome.queue_us
            counters.compute_us_total += outcome.compute_us
        else:
            counters.errors_total += 1
        work.stream.push(outcome.reply)

    async def _info(self, _request: pb.InfoRequest, _context: object) -> pb.InfoReply:
        return self._replica.describe()

    async def _attach(self, _request: pb.AttachRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.AttachReply:
        """Answers when the replica can serve, so that nobody needs to ask again and again."""
        await self._replica.settled.wait()
        if self._replica.state != pb.REPLICA_STATE_READY:
            why = f"{self._replica.replica_id} is {state_name(self._replica.state)}: {self._replica.detail}"
            await context.abort(grpc.StatusCode.UNAVAILABLE, why)
        return pb.AttachReply(lane="grpc")

    async def _load(self, request: pb.LoadColumnRequest, _context: object) -> pb.LoadColumnReply:
        if self._replica.state != pb.REPLICA_STATE_READY:
            detail = f"this replica is {state_name(self._replica.state)}"
            return pb.LoadColumnReply(status=pb.STATUS_NOT_HELD, detail=detail)
        layers = range(request.first_layer, request.first_layer + request.num_layers)
        try:
            size = await self._load_column(request.expert_id, layers)
        except LoadError as error:
            return pb.LoadColumnReply(status=pb.STATUS_INVALID, detail=str(error))
        return pb.LoadColumnReply(status=pb.STATUS_OK, weight_bytes=size)

    async def _drain(self, request: pb.DrainRequest, _context: object) -> pb.DrainReply:
        return pb.DrainReply(inflight_tokens=await self.drain(request.timeout_ms / 1000))


def _refusal(sequence: int, status: pb.Status, detail: str) -> bytes:
    return pb.ForwardReply(sequence=sequence, status=status, detail=detail[:_MAX_DETAIL]).SerializeToString()
