"""What one stream has still to tell its reader: outputs merged per request, so that a slow reader costs little.

The engine never waits for a reader: `push` returns at once, and what a reader has not taken yet is merged
into one output per request. Sending is left to the owner.
"""

import asyncio
from collections import deque
from collections.abc import Iterable

from protos.coordinator_pb2 import GenerateReply, SequenceOutput

# Positions, of prompts or generated, in one message: 8,192 with 20 alternatives each are 4 MB at most.
MAX_REPLY_POSITIONS = 8192
# Tokens and alternatives that may wait for a reader before its stream is given up; about 80 MB of messages.
MAX_PENDING_ENTRIES = 1 << 20
# Requests whose outputs may wait for a reader before its stream is no longer read.
MAX_PENDING_REQUESTS = 4096


class OutboxOverflow(Exception):
    """The reader left more unread than `MAX_PENDING_ENTRIES` tokens and alternatives."""


class Outbox:
    """Outputs by request in order of first arrival. Everything is called from one event loop."""

    def __init__(self, max_entries: int = MAX_PENDING_ENTRIES, max_requests: int = MAX_PENDING_REQUESTS) -> None:
        self._pending: dict[int, SequenceOutput] = {}
        self._answers: deque[SequenceOutput] = deque()
        self._entries = 0
        self._max_entries = max_entries
        self._max_requests = max_requests
        self._closed = False
        self._filled = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()

    def push(self, outputs: Iterable[SequenceOutput]) -> None:
        """Adds what a step gave, merged with what is unread of the same request. Raises OutboxOverflow."""
        for output in outputs:
            waiting = self._pending.get(output.request_id)
            if waiting is None:
                self._pending[output.request_id] = output
            else:
                waiting.MergeFrom(output)
            self._entries += entries(output)
        self._note()
        if self._entries > self._max_entries:
            raise OutboxOverflow(f"{self._entries} unread tokens and alternatives, at most {self._max_entries}")

    def answer(self, output: SequenceOutput) -> None:
        """Adds a refusal, which is never merged: it may carry the id of a request that lives."""
        self._answers.append(output)
        self._note()

    def take(self, max_positions: int = MAX_REPLY_POSITIONS) -> GenerateReply:
        """All that waits, up to `max_positions`; what is cut off comes with the next call. May be empty."""
        reply = GenerateReply()
        room = max_positions
        while self._answers and room > 0:
            reply.outputs.append(self._answers.popleft())
            room -= 1
        while self._pending and room > 0:
            request_id = next(iter(self._pending))
            output = self._pending[request_id]
            part = cut(output, room) if positions(output) > room else self._pending.pop(request_id)
            self._entries -= entries(part)
            room -= max(1, positions(part))
            reply.outputs.append(part)
        self._note()
        return reply

    def holds(self, request_id: int) -> bool:
        """True while something of that request is unread."""
        return request_id in self._pending

    def close(self) -> None:
        """No more will be pushed: wakes the reader."""
        self._closed = True
        self._filled.set()

    async def wait(self) -> bool:
        """Returns True when something can be taken, False when closed and empty."""
        await self._filled.wait()
        return bool(self._pending or self._answers)

    async def wait_for_room(self) -> None:
        """Returns when fewer than `max_requests` requests have something unread."""
        await self._has_room.wait()

    def _note(self) -> None:
        size = len(self._pending) + len(self._answers)
        _switch(self._filled, size > 0 or self._closed)
        _switch(self._has_room, size < self._max_requests)


def positions(output: SequenceOutput) -> int:
    """Prompt positions and generated tokens in one output."""
    return len(output.prompt_logprobs) + len(output.token_ids)


def entries(output: SequenceOutput) -> int:
    """Tokens and alternatives in one output: what its size is proportional to."""
    chosen = len(output.token_ids) + len(output.prompt_logprobs)
    return chosen + sum(len(place.top) for places in (output.logprobs, output.prompt_logprobs) for place in places)


def cut(output: SequenceOutput, max_positions: int) -> SequenceOutput:
    """Takes the first `max_positions` positions out of `output`; finish and status stay in `output`."""
    part = SequenceOutput(request_id=output.request_id, num_prompt_tokens=output.num_prompt_tokens)
    from_prompt = min(max_positions, len(output.prompt_logprobs))
    part.prompt_logprobs.extend(output.prompt_logprobs[:from_prompt])
    del output.prompt_logprobs[:from_prompt]
    tokens = min(max_positions - from_prompt, len(output.token_ids))
    part.token_ids.extend(output.token_ids[:tokens])
    part.logprobs.extend(output.logprobs[:tokens])
    del output.token_ids[:tokens]
    del output.logprobs[:tokens]
    return part


def _switch(event: asyncio.Event, on: bool) -> None:
    if on:
        event.set()
    else:
        event.clear()
