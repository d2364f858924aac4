"""What a coordinator answers over gRPC: Generate for the ingresses, PublishMap, Snapshot and Drain for the
supervisor.

It checks what comes in, gives every request of every stream a sequence in the engine, and takes the engine's
outputs back to the streams. It holds no model and decides nothing; `actors.coordinator.actor` opens and closes it.
"""

import logging
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from actors.coordinator.engine import Engine
from actors.coordinator.engine_io import Failure, GenerationOutput, refusal, to_wire
from actors.coordinator.generate_stream import GenerateStream
from actors.coordinator.submit_check import InvalidSubmit, SubmitLimits, check_submit
from actors.map_wire import MapRefused, map_from_wire
from cluster.expert_map import ExpertMap
from cluster.ids import SequenceId
from cluster.scheduler import QueueFull, RequestTooLong
from cluster.sequence import SequenceError
from protos import coordinator_pb2 as pb
from protos.coordinator_pb2_grpc import (
    CoordinatorServiceServicer,
    add_CoordinatorServiceServicer_to_server,
)
from protos.expert_pb2 import (
    STATUS_INTERNAL,
    STATUS_INVALID,
    STATUS_OK,
    STATUS_OVERLOADED,
    DrainReply,
    DrainRequest,
)

LOG = logging.getLogger(__name__)

SERVICE = "octavo.CoordinatorService"
NOT_READY_RETRY_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlHooks:
    """What the supervisor's calls come down to.

    `apply_map` raises MapRefused; `map_epoch` is the epoch in force; `drain` waits up to that many seconds
    and returns the tokens still in flight.
    """

    apply_map: Callable[[ExpertMap], None]
    map_epoch: Callable[[], int]
    snapshot: Callable[[], pb.SnapshotReply]
    drain: Callable[[float], Awaitable[int]]


class CoordinatorService(CoordinatorServiceServicer):
    """Closed until `open`; while closed every Submit is refused with the given reason."""

    def __init__(self, hooks: ControlHooks, closed_because: Failure) -> None:
        self._hooks = hooks
        self._engine: Engine | None = None
        self._limits: SubmitLimits | None = None
        self._refusal: Failure | None = closed_because
        self._routes: dict[SequenceId, tuple[GenerateStream, int]] = {}
        self._streams: set[GenerateStream] = set()
        self.refused_total = 0
        self.broken_streams_total = 0

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server that is not running yet."""
        add_CoordinatorServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    def open(self, engine: Engine, limits: SubmitLimits) -> None:
        """Takes requests from now on; `deliver` must be the engine's sink."""
        self._engine, self._limits, self._refusal = engine, limits, None

    def close(self, because: Failure) -> None:
        """Takes no new requests; those in flight go on."""
        self._refusal = because

    def end_streams(self) -> None:
        """Ends every stream once what it has to say is said."""
        for stream in self._streams:
            stream.outbox.close()

    def deliver(self, outputs: Sequence[GenerationOutput]) -> None:
        """The engine's sink: hands each stream the outputs of its requests, all at once."""
        by_stream: dict[GenerateStream, list[pb.SequenceOutput]] = {}
        for output in outputs:
            route = self._routes.get(output.seq_id)
            if route is None:
                continue
            stream, request_id = route
            by_stream.setdefault(stream, []).append(to_wire(output, request_id))
            if output.finish_reason is not None:
                del self._routes[output.seq_id]
        for stream, messages in by_stream.items():
            if not stream.push(messages):
                self._cancel_all(stream)

    async def Generate(self, requests: AsyncIterable[pb.GenerateRequest], context: Any) -> None:
        """One ingress's stream. When it ends, however it ends, its requests end with it."""
        await context.send_initial_metadata(())
        stream = GenerateStream()
        self._streams.add(stream)
        try:
            broken = await stream.serve(requests, context, self._act, self._cancel_all)
        finally:
            self._streams.discard(stream)
        if broken is not None:
            self.broken_streams_total += 1
            LOG.warning("a stream of %s was broken off: %s", context.peer(), broken)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, broken)

    async def PublishMap(self, request: pb.PublishMapRequest, context: Any) -> pb.PublishMapReply:
        """Puts a newer map in force; the reply says which epoch is."""
        status, detail = STATUS_OK, ""
        try:
            self._hooks.apply_map(map_from_wire(request))
        except MapRefused as error:
            status, detail = error.status, str(error)
        return pb.PublishMapReply(map_epoch=self._hooks.map_epoch(), status=status, detail=detail)

    async def Snapshot(self, request: pb.SnapshotRequest, context: Any) -> pb.SnapshotReply:
        """The coordinator's state and counters."""
        return self._hooks.snapshot()

    async def Drain(self, request: DrainRequest, context: Any) -> DrainReply:
        """Takes nothing new and waits for what is in flight."""
        return DrainReply(inflight_tokens=await self._hooks.drain(request.timeout_ms / 1000))

    def _act(self, stream: GenerateStream, request: pb.GenerateRequest) -> None:
        if request.HasField("submit"):
            self._submit(stream, request.submit)
        elif request.HasField("cancel"):
            seq_id = stream.live.get(request.cancel.request_id)
            if seq_id is not None and self._engine is not None:
                self._engine.cancel(seq_id)
        # anything else is a kind of request that this version does not know: there is nobody to answer

    def _submit(self, stream: GenerateStream, submit: pb.Submit) -> None:
        """Gives the request a sequence, or answers it alone with the reason."""
        request_id = submit.request_id
        try:
            self._admit(stream, submit)
            return
        except (InvalidSubmit, RequestTooLong, SequenceError) as error:
            answer = refusal(request_id, STATUS_INVALID, str(error))
        except QueueFull as error:
            answer = refusal(request_id, STATUS_OVERLOADED, str(error), error.retry_after_s)
        except _Closed as error:
            retry_s = NOT_READY_RETRY_S if error.failure.status == STATUS_OVERLOADED else 0.0
            answer = refusal(request_id, error.failure.status, error.failure.text, retry_s)
        except Exception:  # the top of the stream's loop: one request must not end all others
            LOG.exception("a request could not be taken")
            answer = refusal(request_id, STATUS_INTERNAL, "internal error; the coordinator's log says more")
        self.refused_total += 1
        stream.outbox.answer(answer)

    def _admit(self, stream: GenerateStream, submit: pb.Submit) -> None:
        if self._refusal is not None or self._engine is None or self._limits is None:
            raise _Closed(self._refusal or Failure(STATUS_INTERNAL, "the coordinator was never opened"))
        if stream.holds(submit.request_id):
            raise InvalidSubmit(f"request_id is {submit.request_id}, which is in use on this stream")
        request = check_submit(submit, self._limits, now_s=self._engine.now(), now_unix_s=time.time())
        seq_id = self._engine.submit(request)
        stream.live[submit.request_id] = seq_id
        self._routes[seq_id] = (stream, submit.request_id)

    def _cancel_all(self, stream: GenerateStream) -> None:
        """Nobody listens any more: gives back blocks and queue places at once."""
        seq_ids = list(stream.live.values())
        stream.live.clear()
        for seq_id in seq_ids:
            self._routes.pop(seq_id, None)
            if self._engine is not None:
                self._engine.cancel(seq_id)


class _Closed(Exception):
    """No requests are taken now."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure
