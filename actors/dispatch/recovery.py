"""What is done about parts without an answer: another replica at once, a hedge when it is overdue, or a pursuit.

A message that failed is replayed on other replicas at once, one message each. One that is overdue is sent to another
replica too, within the budget for such calls, while the first may still answer. A part that nobody else can do now
gets a task that pursues it: until somebody comes back, something changes or a growing pause is over. Nobody gives up
before the round's deadline, unless the replicas say that the rows themselves are at fault. First attempts, and putting
answers in place, are `actors.dispatch.expert_round`'s; who is to blame is `cluster.replica_health`'s.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence

from actors.dispatch.replica_link import ReplicaLink, pauses
from actors.dispatch.replica_pool import ExpertUnavailable, ReplicaPool, RowsRejected
from actors.dispatch.round_parts import DOUBTED, Failure, Message, Part, RemoteStats, still_open
from cluster.replica_health import late_together
from cluster.replica_record import State
from protos import expert_pb2 as pb

LOG = logging.getLogger(__name__)

MAX_REJECTIONS = 4

_POSTPONED = 4  # times the deadline, for messages that are late together
_REJECTIONS = (pb.STATUS_INVALID, pb.STATUS_INTERNAL)  # said of the rows: asking for ever would not help
_FINAL = DOUBTED | {pb.Status.Name(status).removeprefix("STATUS_") for status in _REJECTIONS}


class Recovery:
    """One round's. `send(link, parts, hedge)` sends parts again; `give_up` ends the round with an error."""

    def __init__(
        self,
        pool: ReplicaPool,
        stats: RemoteStats,
        layer: int,
        deadline_s: float,
        send: Callable[[ReplicaLink, Sequence[Part], bool], None],
        give_up: Callable[[BaseException], None],
    ) -> None:
        self._pool = pool
        self._stats = stats
        self._layer = layer
        self._deadline_s = deadline_s
        self._send = send
        self._give_up = give_up
        self._loop = asyncio.get_running_loop()
        self._pursuits: set[asyncio.Task[None]] = set()

    @property
    def pursuing(self) -> bool:
        """Whether any part waits for somebody who can be asked: only the event loop can tell."""
        return bool(self._pursuits)

    def cancel(self) -> None:
        """Nobody waits any more."""
        for pursuit in self._pursuits:
            pursuit.cancel()

    def failed(self, message: Message, failure: Failure) -> None:
        """Its answer came and is none: what nobody else is at goes to somebody else, now."""
        if failure.kind == "DRAINING":
            message.link.mark_draining()
        self._place([part for part in still_open(message.parts) if self._note(part, message.link, failure)], failure)

    def unsent(self, parts: Sequence[Part]) -> None:
        """There was nobody to send them to."""
        failure = Failure("UNREACHABLE", "no replica can be asked")
        self._place([part for part in parts if self._note(part, None, failure)], failure)

    def overdue(self, messages: Iterable[Message], now_s: float) -> float:
        """Asks others for what is overdue. Returns when to look again."""
        waiting = [one for one in messages if not one.reply.done() and any(still_open(one.parts))]
        late = [one for one in waiting if not one.left and one.due_s <= now_s]
        asked = {one.link.replica.replica_id for one in messages}
        slow = {one.link.replica.replica_id for one in late}
        together = late_together(len(slow), len(asked))
        for message in late:
            patience_s = message.due_s - message.sent_s
            if together and not message.postponed:
                message.postponed = True
                message.due_s = message.sent_s + _POSTPONED * patience_s
            elif not self._hedge(message, now_s):
                message.due_s = now_s + patience_s
        return min([one.due_s for one in waiting if not one.left], default=self._deadline_s)

    def expire(self, messages: Iterable[Message]) -> None:
        """The deadline has passed. What is pursued says so itself."""
        parts = [part for message in messages for part in still_open(message.parts) if part.pursuit is None]
        if parts:
            self._give_up(self._unavailable(parts[0], "no answer before the deadline"))

    # ---- overdue -------------------------------------------------------------------------------------

    def _hedge(self, message: Message, now_s: float) -> bool:
        """Whether others were asked for all that the message has not brought, where there are others for it."""
        chosen: dict[ReplicaLink, list[Part]] = {}
        for part in still_open(message.parts):
            others = self._standing_by(part)
            if others:
                chosen.setdefault(others[0], []).append(part)
        if not chosen:
            return False
        record, waited_s = message.link.record, now_s - message.sent_s
        self._pool.book.overdue(record, waited_s, now_s)
        out = record.state is not State.HEALTHY
        if not out and not self._pool.book.budget.take(len(chosen)):
            return False
        message.left = True
        for link, batch in chosen.items():
            for part in batch:
                self._count(part, message.link, Failure("SLOW", f"no answer within {waited_s:.3g} s"))
            self._send(link, batch, not out)  # what an ejected replica has is replayed: that is no hedge
        return True

    def _standing_by(self, part: Part) -> list[ReplicaLink]:
        """Who could do it instead and is not at it, those that have not failed first."""
        busy = {message.link for message in part.under_way}
        able = [
            link
            for link in self._pool.able(self._layer, part.asked.expert_id)
            if link not in busy and link.record.rank < 2 and link.record.silent_since_s is None
        ]
        return sorted(able, key=lambda link: link.replica.replica_id in part.tried)

    # ---- failed --------------------------------------------------------------------------------------

    def _note(self, part: Part, link: ReplicaLink | None, failure: Failure) -> bool:
        """Counts a failure and remembers who it was. Whether the part must be asked again; it may be final."""
        self._count(part, link, failure)
        if link is not None:
            part.tried |= {link.replica.replica_id}
        if failure.kind in _FINAL:
            part.rejections += 1
            if part.rejections >= MAX_REJECTIONS:
                reason = f"{part.rejections} times {failure.kind}: {failure.detail}"
                self._give_up(RowsRejected(part.asked.expert_id, self._layer, reason))
                return False
        return part.pursuit is None and all(message.left for message in part.under_way)

    def _count(self, part: Part, link: ReplicaLink | None, failure: Failure) -> None:
        self._stats.retry_reasons[failure.kind] += 1
        who = "nobody" if link is None else link.replica.replica_id
        LOG.info("expert %d, layer %d at %s: %s", part.asked.expert_id, self._layer, who, failure)

    def _place(self, parts: Sequence[Part], failure: Failure) -> None:
        chosen: dict[ReplicaLink, list[Part]] = {}
        for part in parts:
            fresh = self._fresh(part)
            if not fresh and failure.kind in DOUBTED:  # the only one: whether it says the same again is the question
                fresh = self._pool.able(self._layer, part.asked.expert_id)
            if fresh:
                chosen.setdefault(fresh[0], []).append(part)
            else:
                self._start_pursuit(part, failure)
        for link, batch in chosen.items():
            self._send(link, batch, False)

    def _fresh(self, part: Part) -> list[ReplicaLink]:
        """Who can be asked, is not at it, and has not failed."""
        able = self._pool.able(self._layer, part.asked.expert_id)
        if not part.tried and not part.attempts:
            return able
        busy = {message.link for message in part.under_way}
        return [link for link in able if link not in busy and link.replica.replica_id not in part.tried]

    def _start_pursuit(self, part: Part, failure: Failure) -> None:
        part.pursuit = asyncio.create_task(self._pursue(part, failure))
        self._pursuits.add(part.pursuit)
        part.pursuit.add_done_callback(self._pursuit_ended)

    def _pursuit_ended(self, pursuit: asyncio.Task[None]) -> None:
        self._pursuits.discard(pursuit)
        error = None if pursuit.cancelled() else pursuit.exception()
        if error is not None:
            self._give_up(error)

    async def _pursue(self, part: Part, failure: Failure) -> None:
        """Waits for somebody who has not been tried since the last change or pause. Raises ExpertUnavailable."""
        part.pauses = part.pauses or pauses()
        while not part.answered:
            changed = self._pool.changed
            fresh = self._fresh(part)
            if fresh:
                part.pursuit = None
                self._send(fresh[0], [part], False)
                return
            remaining_s = self._deadline_s - self._loop.time()
            if remaining_s <= 0 or self._pool.closed:
                raise self._unavailable(part, self._reason(part, failure))
            self._stats.waits += 1
            await self._pool.wait_for_change(changed, min(next(part.pauses), remaining_s))
            part.tried = frozenset()

    def _reason(self, part: Part, failure: Failure) -> str:
        expert = part.asked.expert_id
        why_not = self._pool.why_not(self._layer, expert)
        if not part.attempts:
            return f"{failure.kind}: {why_not}"
        able = self._pool.able(self._layer, expert)
        return f"{failure.kind}: {failure.detail}" + ("" if able else f"; {why_not}")

    def _unavailable(self, part: Part, reason: str) -> ExpertUnavailable:
        return ExpertUnavailable(part.asked.expert_id, self._layer, reason)
