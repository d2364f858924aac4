"""One ingress's Generate stream at the coordinator: its requests by both names, and what it has still to be told.

Two tasks per stream: one reads, one writes. The engine waits for neither. What a message means is
`actors.coordinator.service`'s business.
"""

import asyncio
from collections.abc import AsyncIterable, Callable
from typing import Any

from actors.coordinator.outbox import Outbox, OutboxOverflow
from cluster.ids import SequenceId
from protos.coordinator_pb2 import GenerateRequest, SequenceOutput
from protos.outputs import is_last

MAX_REQUESTS = 1 << 16
"""Of an ingress, which counts its own."""


class GenerateStream:
    """`live` maps the stream's own request ids to the engine's sequences; see `holds` for when an id is in use.

    `preparing` are requests that are not sequences yet.

    `client` is whose stream it is, empty for an ingress of this cluster; it has at most `max_requests` at a time.
    """

    def __init__(self, client: str = "", max_requests: int = MAX_REQUESTS) -> None:
        self.client = client
        self.max_requests = max_requests
        self.live: dict[int, SequenceId] = {}
        self.preparing: dict[int, asyncio.Task[None]] = {}
        self.outbox = Outbox()
        self._broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def holds(self, request_id: int) -> bool:
        """True while a request of that id lives, or has something that was not sent yet."""
        return request_id in self.live or request_id in self.preparing or self.outbox.holds(request_id)

    def push(self, output: SequenceOutput) -> bool:
        """Adds what a step gave a request; False when the reader is too slow for this stream to go on."""
        if is_last(output):
            self.live.pop(output.request_id, None)
        try:
            self.outbox.push((output,))
        except OutboxOverflow as error:
            if not self._broken.done():
                self._broken.set_result(f"the reader is too slow: {error}")
            return False
        return True

    async def serve(
        self,
        requests: AsyncIterable[GenerateRequest],
        context: Any,
        act: Callable[["GenerateStream", GenerateRequest], None],
        on_end: Callable[["GenerateStream"], None],
    ) -> str | None:
        """Reads and writes until the other side ends or `outbox` is closed here.

        `on_end` is called as soon as no more can come or be told.

        Returns why the stream must be broken off, None when it ended well. Raises what reading or writing
        raises.
        """
        reader = asyncio.ensure_future(self._read(requests, act, on_end))
        writer = asyncio.ensure_future(self._write(context))
        try:
            ends: set[asyncio.Future[Any]] = {writer, self._broken}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._broken.done():
                return self._broken.result()
            await writer
            if reader.done():
                await reader
            return None
        finally:
            on_end(self)
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            # An error has this frame, and its task the error: they would keep each other.
            del reader, writer, task, ends

    async def _read(
        self,
        requests: AsyncIterable[GenerateRequest],
        act: Callable[["GenerateStream", GenerateRequest], None],
        on_end: Callable[["GenerateStream"], None],
    ) -> None:
        try:
            async for request in requests:
                act(self, request)
                await self.outbox.wait_for_room()
        finally:
            on_end(self)
            self.outbox.close()

    async def _write(self, context: Any) -> None:
        while await self.outbox.wait():
            await context.write(self.outbox.take())
