"""The ingress's side of a coordinator: one long-lived Generate stream that carries all its requests.

A lost stream ends every open request with `CoordinatorLost` and is opened again with a capped back-off;
nothing is resubmitted here, because only the caller knows which tokens its client has seen. Choosing among
coordinators, and going on elsewhere, is `actors.front.coordinator_pool`'s work.
"""

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc

from actors.channels import WireCredentials, open_channel
from protos.coordinator_pb2 import (
    FINISH_REASON_ERROR,
    Cancel,
    GenerateReply,
    GenerateRequest,
    RoomReply,
    RoomRequest,
    SequenceOutput,
    SnapshotReply,
    SnapshotRequest,
    Submit,
)
from protos.coordinator_pb2_grpc import CoordinatorServiceStub
from protos.expert_pb2 import STATUS_OVERLOADED
from protos.outputs import is_last

LOG = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 10.0
ROOM_TIMEOUT_S = 1.0
MIN_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0
MAX_OPEN_REQUESTS = 4096


class CoordinatorLost(ConnectionError):
    """The coordinator is gone or cannot be reached; the request may have produced tokens that nobody saw."""


class OpenRequest:
    """One request on the stream, and what it was answered but nobody took: one merged output, however much that is.

    `inflight_tokens` is what the coordinator still has to compute for it, at most.
    """

    def __init__(self, submit: Submit, wire_id: int) -> None:
        self.message = Submit()
        self.message.CopyFrom(submit)
        self.message.request_id = wire_id
        self.caller_id = submit.request_id
        self._to_generate = submit.max_tokens - len(submit.generated_token_ids)
        self.inflight_tokens = len(submit.prompt_token_ids) + submit.max_tokens
        self.finished = False
        self._unread: SequenceOutput | None = None
        self._lost: str | None = None
        self._changed = asyncio.Event()

    def put(self, output: SequenceOutput) -> None:
        """Merges `output` into what is unread. Prompt logprobs wait for the first token or the end."""
        self.finished = is_last(output)
        if output.token_ids:
            self.inflight_tokens = min(self.inflight_tokens, self._to_generate) - len(output.token_ids)
        if self._unread is None:
            self._unread = output
        else:
            self._unread.MergeFrom(output)
        if self._unread.token_ids or self.finished:
            self._changed.set()

    def lose(self, reason: str) -> None:
        """Ends the request: what is unread can still be taken, then `take` raises."""
        if not self.finished:
            self._lost = reason
            self._changed.set()

    async def take(self) -> SequenceOutput:
        """The next output, merged from all that came since the last call. Raises CoordinatorLost."""
        await self._changed.wait()
        output = self._unread
        if output is None or not (output.token_ids or self.finished):
            raise CoordinatorLost(self._lost)
        self._unread = None
        if self._lost is None:
            self._changed.clear()
        output.request_id = self.caller_id
        return output


class CoordinatorClient:
    """All requests of one ingress to one coordinator. Use it from one event loop; it connects when first used."""

    def __init__(
        self, address: str, credentials: WireCredentials, *, connect_timeout_s: float = CONNECT_TIMEOUT_S
    ) -> None:
        self.address = address
        self._credentials = credentials
        self._connect_timeout_s = connect_timeout_s
        self._open: dict[int, OpenRequest] = {}
        self._next_id = 1
        self._to_send: deque[GenerateRequest] = deque()
        self._has_to_send = asyncio.Event()
        self._connected = asyncio.Event()
        self._channel: grpc.aio.Channel | None = None
        self._runner: asyncio.Task[None] | None = None
        self._why_lost = "not connected yet"
        self._closed = False
        self._on_change: Callable[[], None] = _ignore

    @property
    def connected(self) -> bool:
        """True while the stream is up."""
        return self._connected.is_set()

    @property
    def inflight_tokens(self) -> int:
        """Tokens that the coordinator may still have to compute for this client's requests."""
        return sum(request.inflight_tokens for request in self._open.values())

    def watch(self, on_change: Callable[[], None]) -> None:
        """Calls `on_change` whenever the stream has come up or was lost."""
        self._on_change = on_change

    def open(self) -> None:
        """Begins to connect, and to connect again after every loss, without waiting for it."""
        if self._runner is None and not self._closed:
            self._runner = asyncio.create_task(self._keep_connected())

    async def connect(self) -> None:
        """Waits until the stream is up. Raises CoordinatorLost when it is not within the connect timeout."""
        if self._closed:
            raise CoordinatorLost(f"coordinator {self.address}: the client is closed")
        self.open()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._connected.wait()
        except TimeoutError:
            raise CoordinatorLost(f"coordinator {self.address}: {self._why_lost}") from None

    async def generate(self, submit: Submit) -> AsyncGenerator[SequenceOutput, None]:
        """Submits and yields the outputs, the last of them with a finish reason; a refusal is such an output too.

        Prompt log-probabilities all come with the first output. A reader that is slow gets several steps'
        tokens in one output. Closing the iterator before the end cancels the request. Raises CoordinatorLost.
        """
        if not self.connected:
            await self.connect()
        if len(self._open) >= MAX_OPEN_REQUESTS:
            yield _too_many(submit.request_id)
            return
        request = self._submit(submit)
        try:
            while True:
                output = await request.take()
                yield output
                if is_last(output):
                    return
        finally:
            self._forget(request)

    async def snapshot(self) -> SnapshotReply:
        """The coordinator's counters. Raises CoordinatorLost."""
        try:
            reply: SnapshotReply = await self._stub().Snapshot(SnapshotRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise CoordinatorLost(f"coordinator {self.address}: {_reason(error)}") from None
        return reply

    async def room(self, questions: RoomRequest) -> RoomReply:
        """How many requests it would queue now. Raises CoordinatorLost, too where it does not know that question."""
        try:
            reply: RoomReply = await self._stub().AskRoom(questions, timeout=ROOM_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise CoordinatorLost(f"coordinator {self.address}: {_reason(error)}") from None
        return reply

    async def close(self) -> None:
        """Ends the stream, with it every open request, and the channel."""
        self._closed = True
        if self._runner is not None:
            self._runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._runner
        self._lose("the client was closed")
        if self._channel is not None:
            await self._channel.close()

    def _submit(self, submit: Submit) -> OpenRequest:
        request = OpenRequest(submit, self._next_id)
        self._next_id += 1
        self._open[request.message.request_id] = request
        self._send(GenerateRequest(submit=request.message))
        return request

    def _forget(self, request: OpenRequest) -> None:
        wire_id = request.message.request_id
        if self._open.pop(wire_id, None) is not None and not request.finished and self.connected:
            self._send(GenerateRequest(cancel=Cancel(request_id=wire_id)))

    def _send(self, message: GenerateRequest) -> None:
        self._to_send.append(message)
        self._has_to_send.set()

    async def _keep_connected(self) -> None:
        backoff_s = MIN_BACKOFF_S
        while True:
            try:
                await self._run_stream()
                self._why_lost = "the coordinator ended the stream"
            except grpc.aio.AioRpcError as error:
                self._why_lost = _reason(error)
            except TimeoutError:
                self._why_lost = f"no answer within {self._connect_timeout_s:g} s"
            except Exception as error:  # the top of the loop: without it nothing would ever connect again
                LOG.exception("the stream to coordinator %s broke", self.address)
                self._why_lost = f"{type(error).__name__}: {error}"
            backoff_s = MIN_BACKOFF_S if self.connected else min(MAX_BACKOFF_S, 2 * backoff_s)
            self._lose(self._why_lost)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))

    async def _run_stream(self) -> None:
        """Serves one stream until the coordinator ends it. Raises AioRpcError or TimeoutError."""
        call = self._stub().Generate()
        writer: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await call.initial_metadata()
            if call.done():
                raise await _error_of(call)
            self._connected.set()
            self._on_change()
            writer = asyncio.create_task(self._write(call))
            while (reply := await call.read()) is not grpc.aio.EOF:
                self._deliver(reply)
            if await call.code() is not grpc.StatusCode.OK:
                raise await _error_of(call)
        finally:
            if writer is not None:
                writer.cancel()
            call.cancel()

    async def _write(self, call: Any) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reader tells why
            while True:
                await self._has_to_send.wait()
                while self._to_send:
                    await call.write(self._to_send.popleft())
                self._has_to_send.clear()

    def _deliver(self, reply: GenerateReply) -> None:
        for output in reply.outputs:
            request = self._open.get(output.request_id)
            if request is not None and not request.finished:
                request.put(output)

    def _lose(self, reason: str) -> None:
        self._connected.clear()
        self._to_send.clear()
        self._has_to_send.clear()
        for request in self._open.values():
            request.lose(f"coordinator {self.address}: {reason}")
        self._on_change()

    def _stub(self) -> Any:
        if self._channel is None:
            self._channel = open_channel(self.address, self._credentials)
        return CoordinatorServiceStub(self._channel)  # type: ignore[no-untyped-call]


def _ignore() -> None:
    pass


def _too_many(request_id: int) -> SequenceOutput:
    return SequenceOutput(
        request_id=request_id,
        finish_reason=FINISH_REASON_ERROR,
        status=STATUS_OVERLOADED,
        error=f"{MAX_OPEN_REQUESTS} requests are open at this ingress, the most it may have",
        retry_after_ms=1000,
    )


async def _error_of(call: Any) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
    )


def _reason(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details() or 'no details'}"
