"""What a coordinator answers over gRPC: Generate and AskRoom for the ingresses, PublishMap, Snapshot and Drain for the
supervisor.

It checks what comes in, gives every request of every stream a sequence in the engine, and takes the engine's
outputs back to the streams. It holds no model and decides nothing; `actors.coordinator.actor` opens and closes it.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from actors.client_tokens import ClientTokens
from actors.coordinator.engine import Engine
from actors.coordinator.engine_io import (
    UNEXPLAINED,
    Failure,
    GenerationOutput,
    GenerationRequest,
    cancelled,
    refusal,
    to_wire,
)
from actors.coordinator.generate_stream import GenerateStream
from actors.coordinator.grammars import Grammars, GrammarsBusy
from actors.coordinator.submit_check import InvalidSubmit, SubmitLimits, check_submit, grammar_of
from actors.coordinator.token_masks import token_masks
from actors.coordinator.trace_tap import TooManyListeners
from actors.map_wire import MapRefused, map_from_wire
from cluster.expert_map import ExpertMap
from cluster.ids import SequenceId
from cluster.scheduler import QueueFull, RequestTooLong
from cluster.sequence import SequenceError
from model.grammar.spec import GrammarError, GrammarSpec
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
GENERATE = f"/{SERVICE}/Generate"
NOT_READY_RETRY_S = 2.0
MAX_CLIENT_STREAMS = 16
MAX_CLIENT_REQUESTS = 256
TRACE_PACE_S = 0.2
GRAMMAR_RETRY_S = 2.0
MAX_QUESTIONS = 64
MAX_ROOM = 256
"""More requests than that, of one kind, are not counted."""


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


class BadMessage(ValueError):
    """Bytes on a Generate stream that are no request; nobody can be told but the whole stream."""


class CoordinatorService(CoordinatorServiceServicer):
    """Closed until `open`; while closed every Submit is refused with the given reason.

    A stream whose token is one of `clients` is bounded more tightly than an ingress's.
    """

    def __init__(self, hooks: ControlHooks, closed_because: Failure, clients: ClientTokens | None = None) -> None:
        self._clients = clients
        self._client_streams: Counter[str] = Counter()
        self._hooks = hooks
        self._engine: Engine | None = None
        self._limits: SubmitLimits | None = None
        self._grammars: Grammars | None = None
        self._refusal: Failure | None = closed_because
        self._routes: dict[SequenceId, tuple[GenerateStream, int]] = {}
        self._streams: set[GenerateStream] = set()
        self.refused_total = 0
        self.broken_streams_total = 0

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server that is not running yet. Generate's messages come as bytes: see `_parsed`."""
        add_CoordinatorServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]
        generate: Any = grpc.stream_stream_rpc_method_handler(self.Generate, None, pb.GenerateReply.SerializeToString)
        server.add_registered_method_handlers(SERVICE, {"Generate": generate})  # in place of the generated one

    def open(self, engine: Engine, limits: SubmitLimits, grammars: Grammars | None = None) -> None:
        """Takes requests from now on; `deliver` must be the engine's sink. Without `grammars` none can be followed."""
        self._engine, self._limits, self._grammars, self._refusal = engine, limits, grammars, None

    def close(self, because: Failure) -> None:
        """Takes no new requests; those in flight go on."""
        self._refusal = because

    def end_streams(self) -> None:
        """Ends every stream once what it has to say is said."""
        for stream in self._streams:
            stream.outbox.close()
        if self._engine is not None:
            self._engine.routing.tap.close()

    def deliver(self, outputs: Sequence[GenerationOutput]) -> None:
        """The engine's sink: hands each stream the outputs of its requests, all at once.

        Raises what turning an output into a message raises; then nothing was delivered.
        """
        by_stream: dict[GenerateStream, list[pb.SequenceOutput]] = {}
        for output in outputs:
            route = self._routes.get(output.seq_id)
            if route is not None:
                stream, request_id = route
                by_stream.setdefault(stream, []).append(to_wire(output, request_id))
        for output in outputs:
            if output.finish_reason is not None:
                self._routes.pop(output.seq_id, None)
        for stream, messages in by_stream.items():
            self._push(stream, messages)

    async def Generate(self, requests: AsyncIterable[bytes], context: Any) -> None:
        """The stream of an ingress or a client. When it ends, however it ends, its requests end with it."""
        client = (self._clients.who(context.invocation_metadata()) if self._clients is not None else None) or ""
        if client and self._client_streams[client] >= MAX_CLIENT_STREAMS:
            why = f"{client} has {MAX_CLIENT_STREAMS} streams, the most that it may have"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        await context.send_initial_metadata(())
        stream = GenerateStream(client, MAX_CLIENT_REQUESTS) if client else GenerateStream()
        self._streams.add(stream)
        self._client_streams[client] += 1
        try:
            broken = await stream.serve(self._parsed(requests), context, self._act, self._cancel_all)
        except BadMessage as error:
            LOG.warning("a stream of %s was ended: %s", context.peer(), str(error))  # some keep what is logged
            _end(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
            return
        finally:
            self._client_streams[client] -= 1
            self._streams.discard(stream)
        if broken is not None:
            self.broken_streams_total += 1
            LOG.warning("a stream of %s was broken off: %s", context.peer(), broken)
            _end(context, grpc.StatusCode.RESOURCE_EXHAUSTED, broken)

    async def PublishMap(self, request: pb.PublishMapRequest, context: Any) -> pb.PublishMapReply:
        """Puts a newer map in force; the reply says which epoch is."""
        status, detail = STATUS_OK, ""
        try:
            self._hooks.apply_map(map_from_wire(request))
        except MapRefused as error:
            status, detail = error.status, str(error)
        return pb.PublishMapReply(map_epoch=self._hooks.map_epoch(), status=status, detail=detail)

    async def Trace(self, request: pb.TraceRequest, context: Any) -> None:
        """Which experts tokens take from now on, until either side ends it."""
        if self._engine is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the coordinator is still loading")
            return
        tap, coordinator_id = self._engine.routing.tap, self._hooks.snapshot().coordinator_id
        try:
            listener = tap.listen()
        except TooManyListeners as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
            return
        try:
            while not listener.done:
                await context.write(listener.take(coordinator_id))
                await listener.filled.wait()
                if not listener.has_chunk:  # a message costs as much as a small step: a few steps share one
                    await asyncio.sleep(TRACE_PACE_S)
        finally:
            tap.leave(listener)

    async def Snapshot(self, request: pb.SnapshotRequest, context: Any) -> pb.SnapshotReply:
        """The coordinator's state and counters."""
        return self._hooks.snapshot()

    async def AskRoom(self, request: pb.RoomRequest, context: Any) -> pb.RoomReply:
        """What an ingress may let in, so that it need not ask with its clients' requests."""
        if self._refusal is not None or self._engine is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no requests are taken now")
            raise AssertionError("abort returned")
        if len(request.questions) > MAX_QUESTIONS:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"more than {MAX_QUESTIONS} questions")
        reply = pb.RoomReply()
        for one in request.questions:
            num, retry_s = self._engine.scheduler.room(one.tenant, one.num_tokens, min(one.most, MAX_ROOM))
            reply.rooms.add(num_requests=num, retry_after_ms=round(retry_s * 1000))
        return reply

    async def Drain(self, request: DrainRequest, context: Any) -> DrainReply:
        """Takes nothing new and waits for what is in flight."""
        return DrainReply(inflight_tokens=await self._hooks.drain(request.timeout_ms / 1000))

    async def _parsed(self, requests: AsyncIterable[bytes]) -> AsyncIterator[pb.GenerateRequest]:
        """Raises BadMessage, without parsing, for what is larger than anything that could be valid."""
        async for data in requests:
            size = len(data)
            try:
                if self._limits is not None and size > self._limits.max_message_bytes:
                    limit = self._limits.max_message_bytes
                    raise BadMessage(f"a message of {size} bytes, larger than a valid one's {limit}")
                request = pb.GenerateRequest.FromString(data)
            except DecodeError:
                raise BadMessage("a message is no GenerateRequest") from None
            finally:
                del data  # gRPC keeps what ended a call, and with it this frame, for as long as the other side likes
            yield request

    def _push(self, stream: GenerateStream, messages: Sequence[pb.SequenceOutput]) -> None:
        """A message that cannot be put into its stream is the end of its request, and of no other."""
        for message in messages:
            try:
                if not stream.push(message):
                    self._cancel_all(stream)
                    return
            except Exception:
                LOG.exception("an output could not be put into its stream: its request fails")
                self._cancel(stream, message.request_id)
                stream.outbox.answer(refusal(message.request_id, STATUS_INTERNAL, UNEXPLAINED.text))

    def _act(self, stream: GenerateStream, request: pb.GenerateRequest) -> None:
        if request.HasField("submit"):
            self._submit(stream, request.submit)
        elif request.HasField("cancel"):
            preparing = stream.preparing.pop(request.cancel.request_id, None)
            if preparing is not None:
                preparing.cancel()
                stream.outbox.answer(cancelled(request.cancel.request_id))
            seq_id = stream.live.get(request.cancel.request_id)
            if seq_id is not None and self._engine is not None:
                self._engine.cancel(seq_id)
        # anything else is a kind of request that this version does not know: there is nobody to answer

    def _submit(self, stream: GenerateStream, submit: pb.Submit) -> None:
        """Gives the request a sequence, at once or when its grammar is ready, or answers it alone with the reason."""
        with self._answering(stream, submit.request_id):
            request = self._check(stream, submit)
            spec = grammar_of(submit)
            if spec is None:
                self._admit(stream, submit.request_id, request)
            else:
                self._check_room()
                work = self._admit_later(stream, submit.request_id, request, spec)
                stream.preparing[submit.request_id] = asyncio.ensure_future(work)

    def _check_room(self) -> None:
        """As many may wait for their grammars as for their turn. Raises GrammarsBusy."""
        assert self._engine is not None, "a request was checked against no engine"
        most = self._engine.scheduler.config.max_waiting_requests
        if sum(len(stream.preparing) for stream in self._streams) >= most:
            raise GrammarsBusy(f"{most} requests wait for their grammars, the most that may")

    async def _admit_later(
        self, stream: GenerateStream, request_id: int, request: GenerationRequest, spec: GrammarSpec
    ) -> None:
        """As soon as the grammar is compiled, which others need not wait for."""
        with self._answering(stream, request_id):
            assert self._grammars is not None, "a request with a grammar was let in without any"
            try:
                grammar = await self._grammars.followed(spec, request.generated_ids)
            finally:
                if stream.preparing.get(request_id) is asyncio.current_task():
                    del stream.preparing[request_id]
            if self._refusal is not None:
                raise _Closed(self._refusal)
            self._admit(stream, request_id, replace(request, grammar=grammar))

    @contextlib.contextmanager
    def _answering(self, stream: GenerateStream, request_id: int) -> Iterator[None]:
        """What the block raises becomes the answer to this request alone."""
        try:
            yield
            return
        except (InvalidSubmit, RequestTooLong, SequenceError) as error:
            answer = refusal(request_id, STATUS_INVALID, str(error), field=getattr(error, "field", ""))
        except GrammarError as error:
            answer = refusal(request_id, STATUS_INVALID, f"grammar: {error}", field="grammar")
        except QueueFull as error:
            answer = refusal(request_id, STATUS_OVERLOADED, str(error), error.retry_after_s)
        except GrammarsBusy as error:
            answer = refusal(request_id, STATUS_OVERLOADED, str(error), GRAMMAR_RETRY_S)
        except _Closed as error:
            retry_s = NOT_READY_RETRY_S if error.failure.status == STATUS_OVERLOADED else 0.0
            answer = refusal(request_id, error.failure.status, error.failure.text, retry_s)
        except Exception:  # the top of the stream's loop: one request must not end all others
            LOG.exception("a request could not be taken")
            answer = refusal(request_id, STATUS_INTERNAL, "internal error; the coordinator's log says more")
        self.refused_total += 1
        stream.outbox.answer(answer)

    def _check(self, stream: GenerateStream, submit: pb.Submit) -> GenerationRequest:
        if self._refusal is not None or self._engine is None or self._limits is None:
            raise _Closed(self._refusal or Failure(STATUS_INTERNAL, "the coordinator was never opened"))
        if stream.holds(submit.request_id):
            raise InvalidSubmit(f"request_id is {submit.request_id}, which is in use on this stream")
        if stream.client:
            submit.tenant = stream.client
        if len(stream.live) + len(stream.preparing) >= stream.max_requests:
            raise _Closed(Failure(STATUS_OVERLOADED, f"{stream.max_requests} requests are open on this stream"))
        if submit.HasField("grammar") and self._grammars is None:
            raise InvalidSubmit("grammar is set, but this coordinator has no tokenizer to follow one with")
        request = check_submit(submit, self._limits, now_s=self._engine.now(), now_unix_s=time.time())
        return replace(request, masks=token_masks(submit.sampling))

    def _admit(self, stream: GenerateStream, request_id: int, request: GenerationRequest) -> None:
        assert self._engine is not None, "a request was checked against no engine"
        seq_id = self._engine.submit(request)
        stream.live[request_id] = seq_id
        self._routes[seq_id] = (stream, request_id)

    def _cancel(self, stream: GenerateStream, request_id: int) -> None:
        """Ends one request whose stream is told by somebody else."""
        seq_id = stream.live.pop(request_id, None)
        if seq_id is not None and self._engine is not None:
            self._routes.pop(seq_id, None)
            self._engine.cancel(seq_id)

    def _cancel_all(self, stream: GenerateStream) -> None:
        """Nobody listens any more: gives back blocks and queue places at once."""
        for task in list(stream.preparing.values()):
            task.cancel()
        stream.preparing.clear()
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


def _end(context: Any, code: grpc.StatusCode, detail: str) -> None:
    """What a call ends with when its handler returns.

    `context.abort` raises an error that the call keeps, and that keeps the call with all that was not read of it, until
    the garbage collector finds both.
    """
    context.set_code(code)
    context.set_details(detail)
