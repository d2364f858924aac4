"""One layer's rows on their way to the experts and back: asks, and asks again until every row is answered.

The usual case costs no task and, over same-node lanes, no turn of the event loop: one message per replica, and its
answer is copied in (`actors.dispatch.gathering`) where it arrives. What failed, is overdue or is not believed is asked
again by `actors.dispatch.recovery`. An expert's answer depends on nothing but its rows, so asking twice is harmless
and the first answer is the answer.

N routed rows, D hidden size. A part is one expert's rows, or as many of them as fit a message.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from actors.dispatch.cross_check import CrossCheck
from actors.dispatch.gathering import NOT_FINITE, Gathering
from actors.dispatch.lane_transport import LaneDoorbells
from actors.dispatch.merging import MergedRows, merge
from actors.dispatch.probing import send_probes
from actors.dispatch.recovery import Recovery
from actors.dispatch.replica_link import ReplicaLink
from actors.dispatch.replica_pool import ReplicaPool
from actors.dispatch.round_parts import Message, Part, Patience, RemoteStats, still_open
from actors.dispatch.transport import ExpertRequest, ExpertRows, PendingReply
from cluster.service_times import size_of
from model.dispatch import Answers, DispatchPlan, WeightedAnswers

_LANE_ROWS = 4096  # most rows of a message by a same-node lane: they do not travel, but a replica's queue is bounded
_BLOCK_S = 0.05  # longest wait outside the event loop: probes and cancellations must get their turn
_GRACE_S = 0.01  # who was busy with something else looks at what has come before blaming anybody


class ExpertRound:
    """Made for one layer's rows, which are sent at once; `result` is awaited once, or `abandon` called.

    `x_ND` are the routed rows of `plan`, `max_rows` is how many of them may travel in one message (those in shared
    memory do not travel, and may be more).
    """

    def __init__(
        self,
        pool: ReplicaPool,
        doorbells: LaneDoorbells | None,
        stats: RemoteStats,
        patience: Patience,
        cross_check: CrossCheck,
        layer: int,
        plan: DispatchPlan,
        x_ND: torch.Tensor,
        max_rows: int,
        on_end: Callable[[], None] = lambda: None,
        deadline_s: float | None = None,
    ) -> None:
        self._pool = pool
        self._book = pool.book
        self._times = pool.times
        self._doorbells = doorbells
        self._stats = stats
        self._cross_check = cross_check
        self._layer = layer
        self._plan = plan
        self._x_ND = x_ND
        self._max_rows = max_rows
        self._gathered = Gathering(pool, stats, cross_check, layer, plan, x_ND)
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        now_s = self._loop.time()
        self._deadline_s = now_s + patience.deadline_s
        if deadline_s is not None:
            self._deadline_s = min(self._deadline_s, deadline_s)
        self._deadline_unix_us = patience.wall_us() + int((self._deadline_s - now_s) * 1e6)
        self._size = size_of(len(x_ND))
        self._timeout_s = self._book.times.timeout_s(self._size)
        self._recovery: Recovery | None = None
        self._messages: list[Message] = []
        self._unsent: list[Part] = []
        self._error: BaseException | None = None
        self._finished: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._send_all(_rows_by_expert(plan), now_s)

    async def result(self) -> Answers:
        """out_ND, complete, with other weights where answers were summed elsewhere. Raises ExpertUnavailable."""
        try:
            if self._unsent:
                self._recover().unsent(self._unsent)
            if self._gathered.missing and self._error is None:
                self._wait_outside_the_loop()
            if self._gathered.missing and self._error is None:
                await self._wait_on_the_loop()
            if self._error is not None:
                raise self._error
            output_ND, weights_TK = self._gathered.output_ND, self._gathered.weights_TK
            return output_ND if weights_TK is None else WeightedAnswers(output_ND, weights_TK)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Nobody waits any more: what is under way is ignored when it comes."""
        if self._ended:
            return None
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        if self._recovery is None:
            for message in self._messages:
                message.reply.cancel()
            return self._on_end()
        self._recovery.cancel()
        losers = [one for one in self._messages if (one.left or one.hedge) and not one.reply.done()]
        for message in self._messages:
            if message not in losers:  # those are listened to: a replica that answers late is silent no longer
                message.reply.cancel()
        if self._gathered.missing:
            return self._on_end()
        return self._cross_check.keep(self._layer, losers, self._gathered.output_ND, self._on_end)

    # ---- sending -------------------------------------------------------------------------------------

    def _send_all(self, parts: Sequence[ExpertRows], now_s: float) -> None:
        """One message per replica, or a few where they would be too long."""
        began_s = time.perf_counter()
        if self._book.watching:
            send_probes(
                self._pool, self._stats, self._layer, parts, self._size, self._loop.time, self._request, self._agrees
            )
        for link, batch in self._pool.choose(self._layer, parts).items():
            if link is None:
                self._unsent = [Part(piece) for asked in batch for piece in self._cut(asked, self._max_rows)]
                self._gathered.missing += len(self._unsent)
                continue
            for together, merged in self._messages_for(link, batch):
                self._gathered.missing += len(together)
                self._book.budget.calls += 1
                self._send(link, together, now_s, merged)
        self._stats.send_s += time.perf_counter() - began_s

    def _messages_for(
        self, link: ReplicaLink, batch: Sequence[ExpertRows]
    ) -> Iterator[tuple[list[Part], MergedRows | None]]:
        """What travels is merged where that saves bytes; everything else is cut to size."""
        if link.lane == "shm" and sum([asked.num_rows for asked in batch]) <= _LANE_ROWS:
            yield [Part(asked) for asked in batch], None
            return
        several = link.lane == "grpc" and len(batch) > 1
        merged = merge(self._plan, batch, self._max_rows) if several else []
        for one in merged:
            yield [Part(asked) for asked in one.parts], one
        if not merged:
            most = self._most(link)
            pieces = [Part(piece) for asked in batch for piece in self._cut(asked, most)]
            yield from ((together, None) for together in _packed(pieces, most))

    def _most(self, link: ReplicaLink) -> int:
        """Rows of a message to this replica."""
        return _LANE_ROWS if link.lane == "shm" else self._max_rows

    def _cut(self, asked: ExpertRows, most: int) -> list[ExpertRows]:
        start, stop = asked.rows.start, asked.rows.stop
        if stop - start <= most:
            return [asked]
        return [ExpertRows(asked.expert_id, slice(at, min(at + most, stop))) for at in range(start, stop, most)]

    def _request(self, parts: tuple[ExpertRows, ...], merged: MergedRows | None = None) -> ExpertRequest:
        entries = None if merged is None else merged.entries
        return ExpertRequest(self._layer, self._pool.epoch, self._deadline_unix_us, parts, self._x_ND, entries)

    def _send(
        self,
        link: ReplicaLink,
        parts: Sequence[Part],
        now_s: float,
        merged: MergedRows | None = None,
        hedge: bool = False,
    ) -> None:
        reply = link.send(self._request(tuple([part.asked for part in parts]), merged))
        message = Message(parts, link, now_s, now_s + self._timeout_s, reply, merged, hedge)
        for part in parts:
            part.attempts += (message,)
        self._stats.calls += 1
        self._messages.append(message)
        reply.when_done(partial(self._arrive, message))

    def _send_again(self, link: ReplicaLink, parts: Sequence[Part], hedge: bool) -> None:
        """In pieces where rows that were in shared memory now travel, and are too many for one message."""
        most = self._most(link)
        for part in parts:
            if part.asked.num_rows > most:
                part.pieces = tuple([Part(asked, tried=part.tried) for asked in self._cut(part.asked, most)])
                self._gathered.missing += len(part.pieces) - 1
        for together in _packed(list(still_open(parts)), most):
            self._stats.retries += any(part.attempts for part in parts)
            self._stats.hedges += hedge
            self._send(link, together, self._loop.time(), hedge=hedge)

    # ---- answers -------------------------------------------------------------------------------------

    def _arrive(self, message: Message, reply: PendingReply) -> None:
        """Takes the answer now, whoever waits for it: a turn of the loop later its memory may be used again."""
        if self._ended or reply.cancelled():
            self._stats.wire.late_replies += not reply.cancelled()
            return
        gathered = self._gathered
        missing = gathered.missing
        failure = gathered.take(message)
        if failure is None:
            if gathered.missing < missing:
                now_s = self._loop.time()
                parts = message.parts
                work_s = self._times.usual_s(len(parts), sum([part.asked.num_rows for part in parts]))
                self._book.answered(message.link.record, self._size, now_s - message.sent_s, now_s, work_s)
                self._stats.hedges_won += message.hedge
                if not gathered.missing:
                    self._complete()
        elif failure is NOT_FINITE and message.merged is not None:  # which of the answers in the sums it was
            self._send_again(message.link, list(still_open(message.parts)), False)
        else:
            self._recover().failed(message, failure)

    def _complete(self) -> None:
        """Everything has been answered: ends the round if everything is believed."""
        disbelieved = self._gathered.disbelieved(self._messages)
        for message in disbelieved:
            self._recover().failed(message, NOT_FINITE)
        if not disbelieved:
            self._finish()

    def _agrees(self, link: ReplicaLink, row: int, y_1D: torch.Tensor) -> bool:
        """Whether a probe's answer is the one that was used, as far as that can still be told."""
        return self._ended or self._gathered.agrees(self._messages, link.replica.replica_id, row, y_1D)

    # ---- waiting -------------------------------------------------------------------------------------

    def _finish(self) -> None:
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)

    def _wait_outside_the_loop(self) -> None:
        """While all that is missing comes by lanes: nobody else's turn, no task switch, no future."""
        if self._doorbells is None or self._unsent or any(one.link.lane != "shm" for one in self._messages):
            return
        began_s = self._loop.time()
        until_s = min(began_s + _BLOCK_S, max(self._messages[0].due_s, began_s + _GRACE_S))
        while self._gathered.missing and self._error is None and (remaining_s := until_s - self._loop.time()) > 0:
            if not self._doorbells.wait(remaining_s):
                return
            if self._recovery is not None and self._recovery.pursuing:
                return

    async def _wait_on_the_loop(self) -> None:
        self._finished = self._loop.create_future()
        first_s = min([one.due_s for one in self._messages], default=self._deadline_s)
        self._look_at(max(first_s, self._loop.time() + _GRACE_S))
        await self._finished

    def _look_at(self, when_s: float) -> None:
        when_s = min(when_s, self._deadline_s)
        self._timer = self._loop.call_at(when_s, self._look, when_s)

    def _look(self, meant_s: float) -> None:
        """Patience may be over for somebody."""
        now_s = self._loop.time()
        if self._error is not None or not self._gathered.missing:
            return None
        if now_s >= self._deadline_s:
            return self._recover().expire(self._messages)
        if now_s - meant_s > _GRACE_S:
            return self._look_at(now_s + _GRACE_S)
        return self._look_at(self._recover().overdue(self._messages, now_s))

    def _recover(self) -> Recovery:
        if self._recovery is None:
            self._recovery = Recovery(
                self._pool, self._stats, self._layer, self._deadline_s, self._send_again, self._give_up
            )
        return self._recovery

    def _give_up(self, error: BaseException) -> None:
        self._error = self._error or error
        self._finish()


def _rows_by_expert(plan: DispatchPlan) -> list[ExpertRows]:
    parts: list[ExpertRows] = []
    start = 0
    for expert, count in enumerate(plan.counts):
        if count:
            parts.append(ExpertRows(expert, slice(start, start + count)))
        start += count
    return parts


def _packed(parts: Sequence[Part], most: int) -> Iterator[list[Part]]:
    """Parts in order, as many to a message as its `most` rows allow."""
    together: list[Part] = []
    rows = 0
    for part in parts:
        if together and rows + part.asked.num_rows > most:
            yield together
            together, rows = [], 0
        together.append(part)
        rows += part.asked.num_rows
    yield together
