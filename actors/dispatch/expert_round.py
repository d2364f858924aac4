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
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from actors.dispatch.lane_transport import LaneDoorbells
from actors.dispatch.merging import MergedRows, merge
from actors.dispatch.pursuit import Pursuer
from actors.dispatch.replica_link import ReplicaLink
from actors.dispatch.replica_pool import ReplicaPool
from actors.dispatch.round_parts import Failure, Message, Part, Patience, RemoteStats, failure_of
from actors.dispatch.transport import ExpertRequest, ExpertRows, PendingReply, TransportError
from model.dispatch import Answers, DispatchPlan, WeightedAnswers

LOG = logging.getLogger(__name__)

_LANE_ROWS = 4096  # most rows of a message by a same-node lane: they do not travel, but a replica's queue is bounded
_BLOCK_S = 0.05  # longest wait outside the event loop: probes and cancellations must get their turn


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
        layer: int,
        plan: DispatchPlan,
        x_ND: torch.Tensor,
        max_rows: int,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._pool = pool
        self._doorbells = doorbells
        self._stats = stats
        self._patience = patience
        self._layer = layer
        self._plan = plan
        self._x_ND = x_ND
        self._weights_TK: torch.Tensor | None = None
        self._max_rows = max_rows
        self._output_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._deadline_s = self._loop.time() + patience.deadline_s
        self._pursuer: Pursuer | None = None
        self._messages: list[Message] = []
        self._unsent: list[Part] = []
        self._missing = 0
        self._error: BaseException | None = None
        self._finished: asyncio.Future[None] | None = None
        self._ended = False
        self._send_all(_rows_by_expert(plan))

    async def result(self) -> Answers:
        """out_ND, complete, with other weights where answers were summed elsewhere. Raises ExpertUnavailable."""
        try:
            for part in self._unsent:
                self._start_pursuit(part, None, Failure("UNREACHABLE", "no replica can be asked"))
            if self._missing:
                self._wait_outside_the_loop()
            if self._missing and self._error is None:
                await self._wait_on_the_loop()
            if self._error is not None:
                raise self._error
            if self._weights_TK is None:
                return self._output_ND
            return WeightedAnswers(self._output_ND, self._weights_TK)
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
        chosen: dict[ReplicaLink | None, list[ExpertRows]] = {}
        for asked in parts:
            chosen.setdefault(self._pool.best(self._layer, asked.expert_id), []).append(asked)
        for link, batch in chosen.items():
            if link is None:
                self._unsent = [Part(piece) for asked in batch for piece in self._cut(asked, self._max_rows)]
                self._missing += len(self._unsent)
                continue
            for together, merged in self._messages_for(link, batch):
                self._missing += len(together)
                self._send(link, together, merged)
        self._stats.send_s += time.perf_counter() - began_s

    def _messages_for(
        self, link: ReplicaLink, batch: Sequence[ExpertRows]
    ) -> Iterator[tuple[list[Part], MergedRows | None]]:
        """What travels is merged where that saves bytes; everything else is cut to size."""
        several = link.lane == "grpc" and len(batch) > 1
        merged = merge(self._plan, [asked.expert_id for asked in batch], self._max_rows) if several else []
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

    def _send(self, link: ReplicaLink, parts: Sequence[Part], merged: MergedRows | None = None) -> Message:
        request = ExpertRequest(
            layer_id=self._layer,
            map_epoch=self._pool.epoch,
            deadline_unix_us=self._patience.wall_us() + int((self._deadline_s - self._loop.time()) * 1e6),
            parts=tuple([part.asked for part in parts]),
            x_ND=self._x_ND,
            entries=None if merged is None else merged.entries,
        )
        message = Message(parts, link, self._loop.time(), link.send(request), merged)
        self._messages.append(message)
        message.reply.when_done(partial(self._arrive, message))
        return message

    def _send_again(self, link: ReplicaLink, part: Part) -> Message | None:
        """None when the part goes in pieces: rows that were in shared memory now travel, and are too many for one."""
        most = self._most(link)
        if part.asked.num_rows <= most:
            return self._send(link, [part])
        pieces = [Part(asked, tried=set(part.tried)) for asked in self._cut(part.asked, most)]
        part.answered = True  # whatever comes for all of it at once, its pieces are waited for
        self._missing += len(pieces) - 1
        for piece in pieces:
            message = self._send(link, [piece])
            if not piece.answered and piece.pursuit is None:
                self._start_pursuit(piece, message, None)
        return None

    def _arrive(self, message: Message, reply: PendingReply) -> None:
        """Takes the answer now, whoever waits for it: a turn of the loop later its memory may be used again."""
        if self._ended or reply.cancelled():
            return
        failure = self._take(message)
        if failure is not None:
            for part in message.parts:
                if not part.answered and part.pursuit is None:
                    self._start_pursuit(part, message, failure)

    def _take(self, message: Message) -> Failure | None:
        """Copies an answer into the output, or says why there is none."""
        answer = message.reply.outcome()
        if isinstance(answer, TransportError) or answer.output is None:
            return failure_of(message)
        self._stats.compute_us += answer.compute_us
        self._stats.queue_us += answer.queue_us
        return self._put(message, answer.output)

    def _put(self, message: Message, output: torch.Tensor) -> Failure | None:
        if message.merged is not None:
            if any(part.answered for part in message.parts):
                return failure_of(message)
            if self._weights_TK is None:
                self._weights_TK = self._plan.weights_TK.to("cpu", copy=True)
            message.merged.unpack(output, self._output_ND, self._weights_TK)
        at = 0
        for part in message.parts:
            count = part.asked.num_rows
            if not part.answered:
                if message.merged is None:
                    self._output_ND[part.asked.rows] = output[at : at + count]
                self._note_answered(part)
            at += count
        return None

    def _note_answered(self, part: Part) -> None:
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
        timer = self._loop.call_later(
            min(self._patience.attempt_s, (self._deadline_s - self._loop.time())), self._pursue_all
        )
        try:
            await self._finished
        finally:
            timer.cancel()

    # ---- the others ----------------------------------------------------------------------------------

    def _pursue_all(self) -> None:
        """Patience is over: whoever has not answered is watched, one by one."""
        for message in tuple(self._messages):
            for part in message.parts:
                if not part.answered and part.pursuit is None:
                    self._start_pursuit(part, message, None)

    def _start_pursuit(self, part: Part, message: Message | None, failure: Failure | None) -> None:
        if self._pursuer is None:
            self._pursuer = Pursuer(
                self._pool, self._stats, self._patience, self._layer, self._deadline_s, self._send_again
            )
        part.pursuit = asyncio.create_task(self._pursuer.pursue(part, message, failure))
        part.pursuit.add_done_callback(self._pursuit_ended)

    def _pursuit_ended(self, pursuit: asyncio.Task[None]) -> None:
        error = None if pursuit.cancelled() else pursuit.exception()
        if error is not None:
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
