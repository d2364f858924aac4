"""ExpertService: what an expert actor answers on its port.

Rows of a stream are checked, queued and computed one message at a time; replies may come in any order. A
message that is wrong gets an error for a reply, its stream goes on. Of a peer that does not read its replies
nothing more is read. Taking rows in and computing them is `actors.expert.desk`'s, rows by shared memory
`actors.expert.lane_server`'s; who may call at all is decided before, in `actors.channels`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import torch

from actors.expert.compute_thread import ComputeThread
from actors.expert.desk import Admitted, Desk, Outcome, Refused
from actors.expert.giving import ColumnGiver
from actors.expert.lane_server import LaneServer
from actors.expert.merge import Merged, unpack_merge
from actors.expert.replica import state_name
from actors.expert.reply_stream import ReplyStream
from protos import expert_pb2 as pb
from protos.codec import (
    CodecError,
    check_undamaged,
    encode_refusal,
    encode_reply,
    max_rows_for,
    request_seed,
    restore,
    split_request,
)
from protos.frames import Frame

LOG = logging.getLogger(__name__)

SERVICE = "octavo.ExpertService"
WIRE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_MAX_DETAIL = 512

LoadColumn = Callable[[int, range], Awaitable[int]]
"""Loads one more expert's layers and returns the bytes of its weights; raises LoadError."""


class LoadError(Exception):
    """A column that this replica cannot load; the message says why."""


@dataclass(slots=True)
class _Work:
    request: pb.ForwardRequest
    admitted: Admitted
    hidden: torch.Tensor  # (M, D), or (entries, D) with a merge
    merged: Merged | None
    stream: ReplyStream


class ExpertService:
    """Serves one replica over gRPC; `lanes` offers the same-node lane to those who can use it.

    `giver` answers those who want weights.
    """

    def __init__(
        self, desk: Desk, compute: ComputeThread, load_column: LoadColumn, lanes: LaneServer | None = None
    ) -> None:
        self._desk = desk
        self._replica = desk.replica
        self._compute = compute
        self._load_column = load_column
        self._lanes = lanes
        self.giver = ColumnGiver(desk.replica)
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self._forwards: set[asyncio.Task[None]] = set()
        self._broken_off = ""

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service. Forward's messages come as bytes: one that cannot be parsed must not end its stream."""
        unary = grpc.unary_unary_rpc_method_handler
        reply = pb.InfoReply.SerializeToString
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Forward": grpc.stream_stream_rpc_method_handler(self._forward),
            "Info": unary(self._info, pb.InfoRequest.FromString, reply),
            "Attach": unary(self._attach, pb.AttachRequest.FromString, pb.AttachReply.SerializeToString),
            "LoadColumn": unary(self._load, pb.LoadColumnRequest.FromString, pb.LoadColumnReply.SerializeToString),
            "FetchColumn": grpc.unary_stream_rpc_method_handler(self.giver.give, pb.FetchColumnRequest.FromString),
            "Drain": unary(self._drain, pb.DrainRequest.FromString, pb.DrainReply.SerializeToString),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))

    async def drain(self, timeout_s: float) -> int:
        """Takes nothing new, waits for what is in flight, and returns the tokens still unanswered."""
        replica = self._replica
        self._idle.clear()
        if self._note_idle not in replica.on_idle:
            replica.on_idle += (self._note_idle,)
        replica.begin_drain()
        try:
            if replica.inflight_tokens:
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
        except TimeoutError:
            LOG.warning("%s: %d tokens still in flight", replica.replica_id, replica.inflight_tokens)
        return replica.inflight_tokens

    def break_off(self, reason: str) -> None:
        """Ends every stream, what is computed for it and not yet sent included, and takes no other."""
        self._broken_off = reason
        for forward in self._forwards:
            forward.cancel()

    def _note_idle(self) -> None:
        """In any thread."""
        self._loop.call_soon_threadsafe(self._idle.set)

    async def _forward(self, _requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        task = asyncio.current_task()
        assert task is not None, "gRPC runs every call in a task"
        self._forwards.add(task)
        try:
            if not self._broken_off:
                await self._answer(context)
        except asyncio.CancelledError:
            if not self._broken_off:
                raise
        finally:
            self._forwards.discard(task)
        if self._broken_off:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self._broken_off)

    async def _answer(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
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
        sequence = 0
        try:
            frame = split_request(data)
            sequence = frame.header.sequence
            work = self._take_in(frame, stream)
        except (Refused, CodecError) as error:
            self._replica.refuse()
            stream.push(_refusal(sequence or getattr(error, "sequence", 0), error.status, error.detail))
            return
        stream.unanswered += 1
        # By deadline: rows that were replayed here after a failure elsewhere are older, so they come first.
        self._compute.submit(partial(self._run, work), frame.header.deadline_unix_us)

    def _take_in(self, frame: Frame[pb.ForwardRequest], stream: ReplyStream) -> _Work:
        """Checked rows with a place in the queue. Raises Refused or CodecError."""
        request = frame.header
        if request.sequence == 0:
            raise Refused(pb.STATUS_INVALID, "sequence, experts and deadline_unix_us must not be 0")
        try:
            admitted = self._desk.admit(
                request.layer_id,
                request.expert_ids,
                request.expert_rows,
                map_epoch=request.map_epoch,
                deadline_unix_us=request.deadline_unix_us,
            )
        except Refused:
            check_undamaged(frame)  # no sender's request is refused for what a flipped bit made of it
            raise
        try:
            hidden = self._rows(frame)
            merged = unpack_merge(request, len(hidden))
            return _Work(request, admitted, hidden, merged, stream)
        except CodecError:
            self._desk.finish(admitted, None)
            raise

    def _rows(self, frame: Frame[pb.ForwardRequest]) -> torch.Tensor:
        width = self._replica.hidden_size
        most = min(self._desk.max_queue_tokens, max_rows_for(width, torch.float16))
        seed = request_seed(frame.header)
        return restore(frame.claim, frame.payload, max_rows=most, width=width, dtypes=WIRE_DTYPES, seed=seed)

    def _run(self, work: _Work) -> None:
        """In the compute thread."""
        outcome, reply = None, b""
        if not work.stream.gone:
            output = torch.empty_like(work.hidden)
            outcome = self._compute_rows(work, output)
            reply = _reply(work, outcome, output, max(self._replica.inflight_tokens - work.admitted.total, 0))
        self._loop.call_soon_threadsafe(self._finish, work, outcome, reply)

    def _compute_rows(self, work: _Work, output: torch.Tensor) -> Outcome:
        if work.merged is not None:
            return work.merged.compute(self._desk, work.admitted, work.hidden, output)

        def keep(at: int, y_MD: torch.Tensor) -> None:
            output[at : at + len(y_MD)] = y_MD

        return self._desk.compute(work.admitted, work.hidden, keep)

    def _finish(self, work: _Work, outcome: Outcome | None, reply: bytes) -> None:
        work.stream.unanswered -= 1
        self._desk.finish(work.admitted, outcome)
        if outcome is not None:
            work.stream.push(reply)

    async def _info(self, _request: pb.InfoRequest, _context: object) -> pb.InfoReply:
        return self._replica.describe()

    async def _attach(self, request: pb.AttachRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.AttachReply:
        """Answers when the replica can serve, if only some layers, so that nobody needs to ask again and again."""
        await self._replica.opened.wait()
        if self._replica.state != pb.REPLICA_STATE_READY and not self._replica.serves_while_loading:
            why = f"{self._replica.replica_id} is {state_name(self._replica.state)}: {self._replica.detail}"
            await context.abort(grpc.StatusCode.UNAVAILABLE, why)
        if self._lanes is not None and "shm" in request.lanes:
            offer = self._lanes.offer(request.machine_id)
            if offer is not None:
                return pb.AttachReply(lane="shm", endpoint=offer.endpoint, ticket=offer.ticket)
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


def _reply(work: _Work, outcome: Outcome, output: torch.Tensor, inflight_tokens: int) -> bytes:
    if outcome.status != pb.STATUS_OK:
        return _refusal(work.request.sequence, outcome.status, outcome.detail)
    header = pb.ForwardReply(
        sequence=work.request.sequence,
        status=pb.STATUS_OK,
        compute_us=outcome.compute_us,
        queue_us=outcome.queue_us,
        inflight_tokens=inflight_tokens,
    )
    return encode_reply(header, output, work.request)


def _refusal(sequence: int, status: pb.Status, detail: str) -> bytes:
    return encode_refusal(pb.ForwardReply(sequence=sequence, status=status, detail=detail[:_MAX_DETAIL]))
