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
# Bytes of routed experts in one message.
MAX_REPLY_ROUTED_BYTES = 1 << 20
# Tokens and alternatives that may wait for a reader before its stream is given up; about 80 MB of messages.
MAX_PENDING_ENTRIES = 1 << 20
# Requests whose outputs may wait for a reader before its stream is no longer read.
MAX_PENDING_REQUESTS = 4096
# Refusals, which cost whoever provokes them next to nothing, that may wait likewise.
MAX_PENDING_ANSWERS = 128


class OutboxOverflow(Exception):
    """The reader left more unread than `MAX_PENDING_ENTRIES` tokens and alternatives."""


class Outbox:
    """Outputs by request in order of first arrival. Everything is called from one event loop."""

    def __init__(self, max_entries: int = MAX_PENDING_ENTRIES, max_requests: int = MAX_PENDING_REQUESTS) -> None:
        self._pending: dict[int, SequenceOutput] = {}
        self._sizes: dict[int, int] = {}  # entries of each; counted when pushed: what the writer does is everybody's
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
            size = entries(output)
            waiting = self._pending.get(output.request_id)
            if waiting is None:
                self._pending[output.request_id] = output
            else:
                waiting.MergeFrom(output)
            self._sizes[output.request_id] = self._sizes.get(output.request_id, 0) + size
            self._entries += size
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
        room, routed_bytes = max_positions, MAX_REPLY_ROUTED_BYTES
        while self._answers and room > 0:
            reply.outputs.append(self._answers.popleft())
            room -= 1
        while self._pending and room > 0 and routed_bytes > 0:
            request_id = next(iter(self._pending))
            output = self._pending[request_id]
            whole = positions(output) <= room and _routed_bytes(output) <= routed_bytes
            part = self._pending.pop(request_id) if whole else cut(output, room, routed_bytes)
            size = self._sizes[request_id] if whole else entries(part)
            self._sizes[request_id] -= size
            if whole:
                del self._sizes[request_id]
            self._entries -= size
            room -= max(1, positions(part))
            routed_bytes -= _routed_bytes(part)
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
        """Returns when fewer than `max_requests` requests have something unread, and few refusals are."""
        await self._has_room.wait()

    def _note(self) -> None:
        size = len(self._pending) + len(self._answers)
        _switch(self._filled, size > 0 or self._closed)
        _switch(self._has_room, size < self._max_requests and len(self._answers) < MAX_PENDING_ANSWERS)


def positions(output: SequenceOutput) -> int:
    """Prompt positions and generated tokens in one output."""
    return len(output.prompt_logprobs) + len(output.token_ids)


def entries(output: SequenceOutput) -> int:
    """Tokens, alternatives and positions with experts in one output: what its size is proportional to."""
    chosen = len(output.token_ids) + len(output.prompt_logprobs)
    chosen += len(output.routed_experts)
    return chosen + sum(len(place.top) for places in (output.logprobs, output.prompt_logprobs) for place in places)


def cut(output: SequenceOutput, max_positions: int, max_routed_bytes: int = MAX_REPLY_ROUTED_BYTES) -> SequenceOutput:
    """Takes the first `max_positions` positions out of `output`; finish and status stay in `output`.

    Tokens come with the experts of all positions before them, not more: whoever loses the rest knows where it stands.
    Experts for which there is no room come first, alone, at least one at a time.
    """
    part = SequenceOutput(request_id=output.request_id, num_prompt_tokens=output.num_prompt_tokens)
    part.num_cached_tokens = output.num_cached_tokens
    from_prompt = min(max_positions, len(output.prompt_logprobs))
    part.prompt_logprobs.extend(output.prompt_logprobs[:from_prompt])
    del output.prompt_logprobs[:from_prompt]
    tokens = min(max_positions - from_prompt, len(output.token_ids))
    if output.routed_experts:
        tokens = _cut_routed(output, part, tokens, max_routed_bytes)
    part.token_ids.extend(output.token_ids[:tokens])
    part.logprobs.extend(output.logprobs[:tokens])
    del output.token_ids[:tokens]
    del output.logprobs[:tokens]
    return part


def _cut_routed(output: SequenceOutput, part: SequenceOutput, tokens: int, max_bytes: int) -> int:
    """Moves experts to `part`, and returns how many of the `tokens` may follow: each of the last has one."""
    fits = max(1, max_bytes // max(1, len(output.routed_experts[0])))
    before = max(0, len(output.routed_experts) - len(output.token_ids))
    tokens = max(0, min(tokens, fits - before))
    taken = before + tokens if tokens else min(fits, before)
    part.routed_experts.extend(output.routed_experts[:taken])
    del output.routed_experts[:taken]
    return tokens


def _routed_bytes(output: SequenceOutput) -> int:
    rows = output.routed_experts
    return len(rows) * len(rows[0]) if rows else 0


def _switch(event: asyncio.Event, on: bool) -> None:
    if on:
        event.set()
    else:
        event.clear()
