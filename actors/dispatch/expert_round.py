"""One layer's rows on their way to the experts and back: asks, and asks again until every row is answered.

The usual case costs no task and, over same-node lanes, no turn of the event loop: one message per replica, and its
answer is copied in where it arrives. Only a part whose first attempt failed, or takes too long while somebody else
could do it, gets a task that pursues it: at another replica, or the same one when something has changed or after
a growing pause. An expert's answer depends on nothing but its rows, so asking twice is harmless and the first
answer is the answer.

N routed rows, D hidden size. A part is one expert's rows, or as many of them as fit a message.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from actors.dispatch.lane_transport import LaneDoorbells
from actors.dispatch.replica_link import ReplicaLink, pauses
from actors.dispatch.replica_pool import ExpertUnavailable, ReplicaPool
from actors.dispatch.transport import ExpertRequest, ExpertRows, PendingReply, TransportError, WireCounters
from cluster.ids import ReplicaId
from protos import expert_pb2 as pb

LOG = logging.getLogger(__name__)

MAX_REJECTIONS = 4

_REJECTIONS = (pb.STATUS_INVALID, pb.STATUS_INTERNAL)  # said of the rows: asking for ever would not help
_REJECTION_NAMES = frozenset(pb.Status.Name(status).removeprefix("STATUS_") for status in _REJECTIONS)
_LANE_ROWS = 4096  # most rows of a message by a same-node lane: they do not travel, but a replica's queue is bounded
_BLOCK_S = 0.05  # longest wait outside the event loop: probes and cancellations must get their turn


@dataclass(slots=True)
class RemoteStats:
    """Since start. `retries` counts messages sent again, `waits` the times that nobody could be asked.

    `compute_us` and `queue_us` are the replicas' own, summed over messages; `send_s` is the time spent sending.
    """

    retries: int = 0
    retry_reasons: Counter[str] = field(default_factory=Counter)
    waits: int = 0
    compute_us: int = 0
    queue_us: int = 0
    send_s: float = 0.0
    wire: WireCounters = field(default_factory=WireCounters)


@dataclass(frozen=True, slots=True)
class Patience:
    """`deadline_s` bounds a round; after `attempt_s` without an answer somebody else is asked, if there is one.

    `wall_us` is the clock of deadlines on the wire, microseconds since 1970.
    """

    deadline_s: float = 60.0
    attempt_s: float = 20.0
    wall_us: Callable[[], int] = lambda: time.time_ns() // 1000


@dataclass(slots=True, eq=False)
class _Part:
    """Rows for one expert, and how it goes with them."""

    asked: ExpertRows
    answered: bool = False
    rejections: int = 0
    pursuit: asyncio.Task[None] | None = None
    tried: set[ReplicaId] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Message:
    """Parts that went to one replica together."""

    parts: Sequence[_Part]
    link: ReplicaLink
    sent_s: float
    reply: PendingReply
    left: bool = False  # it took too long; but whenever it answers, its link is trusted again


@dataclass(frozen=True, slots=True)
class _Failure:
    kind: str
    detail: str


class ExpertRound:
    """Made for one layer's rows, which are sent at once; `result` is awaited once, or `abandon` called.

    `x_ND` are the routed rows, `parts` say which of them are for whom, `max_rows` how many of them may travel in
    one message (those in shared memory do not travel, and may be more).
    """

    def __init__(
        self,
        pool: ReplicaPool,
        doorbells: LaneDoorbells | None,
        stats: RemoteStats,
        patience: Patience,
        layer: int,
        x_ND: torch.Tensor,
        parts: Sequence[ExpertRows],
        max_rows: int,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._pool = pool
        self._doorbells = doorbells
        self._stats = stats
        self._patience = patience
        self._layer = layer
        self._x_ND = x_ND
        self._max_rows = max_rows
        self._output_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._deadline_s = self._loop.time() + patience.deadline_s
        self._messages: list[_Message] = []
        self._unsent: list[_Part] = []
        self._missing = 0
        self._error: BaseException | None = None
        self._finished: asyncio.Future[None] | None = None
        self._ended = False
        self._send_all(parts)

    async def result(self) -> torch.Tensor:
        """out_ND, complete. Raises ExpertUnavailable."""
        try:
            for part in self._unsent:
                self._start_pursuit(part, None, _Failure("UNREACHABLE", "no replica can be asked"))
            if self._missing:
                self._wait_outside_the_loop()
            if self._missing and self._error is None:
                await self._wait_on_the_loop()
            if self._error is not None:
                raise self._error
            return self._output_ND
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Nobody waits any more: what is under way is ignored when it comes."""
        if self._ended:
            return
        self._ended = True
        for message in self._messages:
            if not message.left:
                message.reply.cancel()
            for part in message.parts:
                if part.pursuit is not None:
                    part.pursuit.cancel()
        for part in self._unsent:
            if part.pursuit is not None:
                part.pursuit.cancel()
        self._on_end()

    # ---- the usual case ------------------------------------------------------------------------------

    def _send_all(self, parts: Sequence[ExpertRows]) -> None:
        """One message per replica, or a few where they would be too long."""
        began_s = time.perf_counter()
        chosen: dict[ReplicaLink, list[_Part]] = {}
        for asked in parts:
            link = self._pool.best(self._layer, asked.expert_id)
            made = [_Part(piece) for piece in self._cut(asked, self._most(link))]
            self._missing += len(made)
            if link is None:
                self._unsent += made
            else:
                chosen.setdefault(link, []).extend(made)
        for link, batch in chosen.items():
            for together in _packed(batch, self._most(link)):
                self._send(link, together)
        self._stats.send_s += time.perf_counter() - began_s

    def _most(self, link: ReplicaLink | None) -> int:
        """Rows of a message to this replica."""
        return _LANE_ROWS if link is not None and link.lane == "shm" else self._max_rows

    def _cut(self, asked: ExpertRows, most: int) -> list[ExpertRows]:
        start, stop = asked.rows.start, asked.rows.stop
        return [ExpertRows(asked.expert_id, slice(at, min(at + most, stop))) for at in range(start, stop, most)]

    def _send(self, link: ReplicaLink, parts: Sequence[_Part]) -> _Message:
        request = ExpertRequest(
            layer_id=self._layer,
            map_epoch=self._pool.epoch,
            deadline_unix_us=self._patience.wall_us() + int(self._remaining_s() * 1e6),
            parts=tuple([part.asked for part in parts]),
            x_ND=self._x_ND,
        )
        message = _Message(parts, link, self._loop.time(), link.send(request))
        self._messages.append(message)
        message.reply.when_done(partial(self._arrive, message))
        return message

    def _arrive(self, message: _Message, reply: PendingReply) -> None:
        """Takes the answer now, whoever waits for it: a turn of the loop later its memory may be used again."""
        if self._ended or reply.cancelled():
            return
        failure = self._take(message)
        if failure is not None:
            for part in message.parts:
                if not part.answered and part.pursuit is None:
                    self._start_pursuit(part, message, failure)

    def _take(self, message: _Message) -> _Failure | None:
        """Copies an answer into the output, or says why there is none."""
        answer = message.reply.outcome()
        if isinstance(answer, TransportError) or answer.output is None:
            return self._failure(message)
        self._stats.compute_us += answer.compute_us
        self._stats.queue_us += answer.queue_us
        at = 0
        for part in message.parts:
            count = part.asked.num_rows
            if not part.answered:
                self._output_ND[part.asked.rows] = answer.output[at : at + count]
                self._note_answered(part)
            at += count
        return None

    def _failure(self, message: _Message) -> _Failure:
        """Why there is no answer."""
        answer = message.reply.outcome()
        if isinstance(answer, TransportError):
            return _Failure("CONNECTION", str(answer))
        return _Failure(pb.Status.Name(answer.status).removeprefix("STATUS_"), answer.detail)

    def _note_answered(self, part: _Part) -> None:
        part.answered = True
        if part.pursuit is not None and part.pursuit is not asyncio.current_task():
            part.pursuit.cancel()
        self._missing -= 1
        if self._missing == 0:
            self._finish()

    def _finish(self) -> None:
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)

    def _wait_outside_the_loop(self) -> None:
        """While all that is missing comes by lanes: nobody else's turn, no task switch, no future."""
        if self._doorbells is None or self._unsent or any(one.link.lane != "shm" for one in self._messages):
            return
        until_s = time.monotonic() + min(_BLOCK_S, self._patience.attempt_s)
        pursued = False
        while self._missing and not pursued and (remaining_s := until_s - time.monotonic()) > 0:
            if not self._doorbells.wait(remaining_s):
                return
            pursued = any(part.pursuit is not None for one in self._messages for part in one.parts)

    async def _wait_on_the_loop(self) -> None:
        self._finished = self._loop.create_future()
        timer = self._loop.call_later(min(self._patience.attempt_s, self._remaining_s()), self._pursue_all)
        try:
            await self._finished
        finally:
            timer.cancel()

    # ---- pursuit -------------------------------------------------------------------------------------

    def _pursue_all(self) -> None:
        """Patience is over: whoever has not answered is watched, one by one."""
        for message in tuple(self._messages):
            for part in message.parts:
                if not part.answered and part.pursuit is None:
                    self._start_pursuit(part, message, None)

    def _start_pursuit(self, part: _Part, message: _Message | None, failure: _Failure | None) -> None:
        part.pursuit = asyncio.create_task(self._pursue(part, message, failure))
        part.pursuit.add_done_callback(self._pursuit_ended)

    def _pursuit_ended(self, pursuit: asyncio.Task[None]) -> None:
        error = None if pursuit.cancelled() else pursuit.exception()
        if error is not None:
            self._error = self._error or error
            self._finish()

    async def _pursue(self, part: _Part, message: _Message | None, failure: _Failure | None) -> None:
        pause = pauses()
        while not part.answered:
            if failure is None:
                assert message is not None, "a part that was never sent has failed"
                failure = await self._outcome(part, message)
            if failure is not None:
                self._note(part, message, failure)
                link = await self._next_link(part, message, failure, pause)
                self._stats.retries += message is not None
                if part.asked.num_rows > self._most(link):
                    return self._send_in_pieces(link, part)
                message, failure = self._send(link, [part]), None
        return None

    def _send_in_pieces(self, link: ReplicaLink, part: _Part) -> None:
        """Rows that were in shared memory have to travel, and are too many for one message."""
        pieces = [_Part(asked, tried=set(part.tried)) for asked in self._cut(part.asked, self._most(link))]
        part.answered = True  # whatever comes for all of it at once, its pieces are waited for
        self._missing += len(pieces) - 1
        for piece in pieces:
            message = self._send(link, [piece])
            if not piece.answered and piece.pursuit is None:
                self._start_pursuit(piece, message, None)

    async def _outcome(self, part: _Part, message: _Message) -> _Failure | None:
        """Waits for the attempt under way; leaves it when it takes long and somebody else can do it."""
        while not message.reply.done():
            if self._remaining_s() <= 0:
                raise self._unavailable(part, "no answer before the deadline")
            overdue_s = self._loop.time() - message.sent_s - self._patience.attempt_s
            if overdue_s >= 0 and self._others(part, message):
                message.left = True
                return _Failure("SLOW", f"no answer within {self._patience.attempt_s:g} s")
            wait_s = -overdue_s if overdue_s < 0 else self._patience.attempt_s
            await message.reply.wait(min(wait_s, self._remaining_s()))
        return None if part.answered else self._failure(message)

    def _note(self, part: _Part, message: _Message | None, failure: _Failure) -> None:
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
        self, part: _Part, message: _Message | None, failure: _Failure, pause: Iterator[float]
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

    def _others(self, part: _Part, message: _Message | None) -> list[ReplicaLink]:
        able = self._pool.able(self._layer, part.asked.expert_id)
        waiting = message.link if message is not None and not message.reply.done() else None
        return [link for link in able if link is not waiting and link.replica.replica_id not in part.tried]

    def _unavailable(self, part: _Part, reason: str) -> ExpertUnavailable:
        return ExpertUnavailable(part.asked.expert_id, self._layer, reason)

    def _remaining_s(self) -> float:
        return self._deadline_s - self._loop.time()


def _packed(parts: Sequence[_Part], most: int) -> Iterator[list[_Part]]:
    """Parts in order, as many to a message as its `most` rows allow."""
    together: list[_Part] = []
    rows = 0
    for part in parts:
        if together and rows + part.asked.num_rows > most:
            yield together
            together, rows = [], 0
        together.append(part)
        rows += part.asked.num_rows
    yield together
