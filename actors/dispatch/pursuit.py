"""Pursues one part whose first attempt failed or takes long: another replica, or the same one when something changed.

Never gives up before the round's deadline, unless the replicas say that the rows themselves are at fault. The first
attempt, and putting answers in place, are `actors.dispatch.expert_round`'s.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator

from actors.dispatch.replica_link import ReplicaLink, pauses
from actors.dispatch.replica_pool import ExpertUnavailable, ReplicaPool
from actors.dispatch.round_parts import Failure, Message, Part, Patience, RemoteStats, failure_of
from protos import expert_pb2 as pb

LOG = logging.getLogger(__name__)

MAX_REJECTIONS = 4

_REJECTIONS = (pb.STATUS_INVALID, pb.STATUS_INTERNAL)  # said of the rows: asking for ever would not help
_REJECTION_NAMES = frozenset(pb.Status.Name(status).removeprefix("STATUS_") for status in _REJECTIONS)


class Pursuer:
    """One round's. `send` sends a part again, or in pieces that are pursued on their own, and then returns None."""

    def __init__(
        self,
        pool: ReplicaPool,
        stats: RemoteStats,
        patience: Patience,
        layer: int,
        deadline_s: float,
        send: Callable[[ReplicaLink, Part], Message | None],
    ) -> None:
        self._pool = pool
        self._stats = stats
        self._patience = patience
        self._layer = layer
        self._deadline_s = deadline_s
        self._send = send
        self._loop = asyncio.get_running_loop()

    async def pursue(self, part: Part, message: Message | None, failure: Failure | None) -> None:
        """Returns when the part is answered. Raises ExpertUnavailable. Without `message` it was never sent."""
        pause = pauses()
        while not part.answered:
            if failure is None:
                assert message is not None, "a part that was never sent has failed"
                failure = await self._outcome(part, message)
            if failure is not None:
                self._note(part, message, failure)
                link = await self._next_link(part, message, failure, pause)
                self._stats.retries += message is not None
                message, failure = self._send(link, part), None
                if message is None:
                    return

    async def _outcome(self, part: Part, message: Message) -> Failure | None:
        """Waits for the attempt under way; leaves it when it takes long and somebody else can do it."""
        while not message.reply.done():
            if self._remaining_s() <= 0:
                raise self._unavailable(part, "no answer before the deadline")
            overdue_s = self._loop.time() - message.sent_s - self._patience.attempt_s
            if overdue_s >= 0 and self._others(part, message):
                message.left = True
                return Failure("SLOW", f"no answer within {self._patience.attempt_s:g} s")
            wait_s = -overdue_s if overdue_s < 0 else self._patience.attempt_s
            await message.reply.wait(min(wait_s, self._remaining_s()))
        return None if part.answered else failure_of(message)

    def _note(self, part: Part, message: Message | None, failure: Failure) -> None:
        """Counts a failure and remembers who it was. Raises ExpertUnavailable when it is final."""
        self._stats.retry_reasons[failure.kind] += 1
        who = "nobody" if message is None else message.link.replica.replica_id
        LOG.info("expert %d, layer %d at %s: %s", part.asked.expert_id, self._layer, who, failure)
        if message is not None:
            part.tried.add(message.link.replica.replica_id)
            if failure.kind == "SLOW":
                message.link.mark_suspect()
            if failure.kind == "DRAINING":
                message.link.mark_draining()
        if failure.kind in _REJECTION_NAMES:
            part.rejections += 1
            if part.rejections >= MAX_REJECTIONS:
                raise self._unavailable(part, f"{part.rejections} times {failure.kind}: {failure.detail}")

    async def _next_link(
        self, part: Part, message: Message | None, failure: Failure, pause: Iterator[float]
    ) -> ReplicaLink:
        """Somebody who has not been tried since the last change or pause. Raises ExpertUnavailable."""
        while True:
            changed = self._pool.changed
            fresh = self._others(part, message)
            if fresh:
                return fresh[0]
            remaining_s = self._remaining_s()
            if remaining_s <= 0 or self._pool.closed:
                why = self._pool.why_not(self._layer, part.asked.expert_id) if message is None else failure.detail
                raise self._unavailable(part, f"{failure.kind}: {why}")
            self._stats.waits += 1
            await self._pool.wait_for_change(changed, min(next(pause), remaining_s))
            part.tried.clear()

    def _others(self, part: Part, message: Message | None) -> list[ReplicaLink]:
        able = self._pool.able(self._layer, part.asked.expert_id)
        waiting = message.link if message is not None and not message.reply.done() else None
        return [link for link in able if link is not waiting and link.replica.replica_id not in part.tried]

    def _unavailable(self, part: Part, reason: str) -> ExpertUnavailable:
        return ExpertUnavailable(part.asked.expert_id, self._layer, reason)

    def _remaining_s(self) -> float:
        return self._deadline_s - self._loop.time()
