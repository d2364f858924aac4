"""The replies of one Forward call, in the order in which they became ready.

Bounded by not reading: while a peer leaves `MAX_UNREAD_REPLIES` replies or `MAX_UNREAD_BYTES` unread, `wait_for_room`
keeps the service from taking more of its messages; what was taken before then is bounded by the replica's queue. What
the messages mean is `actors.expert.service`'s.
"""

import asyncio
from collections import deque
from typing import TypeAlias

import grpc

from protos.limits import MAX_MESSAGE_BYTES

MAX_UNREAD_REPLIES = 256
MAX_UNREAD_BYTES = 2 * MAX_MESSAGE_BYTES

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"


class ReplyStream:
    """`gone` once the peer is: nobody will read. `unanswered` counts what is queued or computed for it."""

    def __init__(self) -> None:
        self.gone = False
        self.unanswered = 0
        self._half_closed = False
        self._replies: deque[bytes] = deque()
        self._bytes = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()

    async def read(self, context: Context) -> bytes | None:
        """The next message, None when the peer sends no more."""
        data: object = await context.read()
        return data if isinstance(data, bytes) else None  # else it is grpc.aio.EOF

    def push(self, reply: bytes) -> None:
        """Queues a reply; from the event loop only."""
        self._replies.append(reply)
        self._bytes += len(reply)
        self._wake.set()

    def end(self) -> None:
        """The peer sends no more: the call ends when everything is answered."""
        self._half_closed = True
        self._wake.set()

    async def wait_for_room(self) -> None:
        """Returns when the peer has read enough of its replies."""
        while len(self._replies) >= MAX_UNREAD_REPLIES or self._bytes >= MAX_UNREAD_BYTES:
            self._room.clear()
            await self._room.wait()

    async def write_to(self, context: Context) -> None:
        """Writes replies as they come; returns when the peer has ended and everything is answered."""
        while True:
            while self._replies:
                reply = self._replies.popleft()
                self._bytes -= len(reply)
                await context.write(reply)
                self._room.set()
            if self._half_closed and self.unanswered == 0:
                return
            self._wake.clear()
            await self._wake.wait()
