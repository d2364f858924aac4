"""One layer's rows on their way to the experts and back: asks, and asks again until every row is answered.

The usual case costs no task: a message is sent per part and a callback copies its answer in. Only a part
whose first attempt failed, or takes too long while somebody else could do it, gets a task that pursues it: at
another replica, or the same one when something has changed or after a growing pause. An expert's answer
depends on nothing but its rows, so asking twice is harmless and the first answer is the answer.

N routed rows, D hidden size. A part is what one message carries: one expert's rows, or as many of them as
fit.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from actors.dispatch.replica_link import ReplicaLink, pauses
from actors.dispatch.replica_pool import ExpertUnavailable, ReplicaPool
from actors.dispatch.transport import ExpertReply, ExpertRequest, WireCounters
from cluster.ids import ReplicaId
from protos import expert_pb2 as pb

LOG = logging.getLogger(__name__)

MAX_REJECTIONS = 4
_REJECTIONS = (pb.STATUS_INVALID, pb.STATUS_INTERNAL)  # said of the rows: asking for ever would not help


@dataclass(slots=True)
class RemoteStats:
    """Since start. `retries` counts messages sent again, `waits` the times that nobody could be asked."""

    retries: int = 0
    retry_reasons: Counter[str] = field(default_factory=Counter)
    waits: int = 0
    compute_us: int = 0
    queue_us: int = 0
    wire: WireCounters = field(default_factory=WireCounters)


@dataclass(frozen=True, slots=True)
class Patience:
    """`deadline_s` bounds a round; after `attempt_s` without an answer somebody else is asked, if there is one.

    `wall_us` is the clock of deadlines on the wire, microseconds since 1970.
    """

    deadline_s: float = 60.0
    attempt_s: float = 20.0
    wall_us: Callable[[], int] = lambda: time.time_ns() // 1000


@dataclass(slots=True)
class Part:
    """Rows `rows` for `expert`, and how it goes with them."""

    expert: int
    rows: slice
    link: ReplicaLink | None = None
    reply: asyncio.Future[ExpertReply] | None = None
    sent_s: float = 0.0
    rejections: int = 0
    pursued: bool = False
    tried: set[ReplicaId] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Failure:
    kind: str
    detail: str


class ExpertRound:
    """Made for one `run` of one layer; `result` is awaited once."""

    def __init__(
        self,
        pool: ReplicaPool,
        stats: RemoteStats,
        patience: Patience,
        layer: int,
        hidden_ND: torch.Tensor,
        parts: list[Part],
    ) -> None:
        self._pool = pool
        self._stats = stats
        self._patience = patience
        self._layer = layer
        self._hidden_ND = hidden_ND
        self._output_ND = torch.empty_like(hidden_ND)
        self._parts = parts
        self._loop = asyncio.get_running_loop()
        self._deadline_s = self._loop.time() + patience.deadline_s
        self._missing = len(parts)
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._pursuits: set[asyncio.Task[None]] = set()

    async def result(self) -> torch.Tensor:
        """out_ND, complete. Raises ExpertUnavailable."""
        limit_s = min(self._patience.attempt_s, self._patience.deadline_s)
        timer = self._loop.call_later(limit_s, self._pursue_all)
        try:
            for part in self._parts:
                self._begin(part)
            await self._finished
        finally:
            timer.cancel()
            self._abandon()
        return self._output_ND

    def _begin(self, part: Part) -> None:
        able = self._pool.able(self._layer, part.expert)
        if able:
            self._send(part, able[0]).add_done_callback(partial(self._answered, part))
        else:
            self._start_pursuit(part)

    def _send(self, part: Part, link: ReplicaLink) -> asyncio.Future[ExpertReply]:
        remaining_us = int(self._remaining_s() * 1e6)
        request = ExpertRequest(
            layer_id=self._layer,
            expert_id=part.expert,
            map_epoch=self._pool.epoch,
            deadline_unix_us=self._patience.wall_us() + remaining_us,
            hidden=self._hidden_ND[part.rows],
        )
        part.link = link
        part.sent_s = self._loop.time()
        part.reply = link.send(request)
        return part.reply

    def _answered(self, part: Part, reply: asyncio.Future[ExpertReply]) -> None:
        """The first attempt has ended."""
        if part.pursued or self._finished.done() or self._take(part, reply) is None:
            return
        self._start_pursuit(part)

    def _take(self, part: Part, reply: asyncio.Future[ExpertReply]) -> _Failure | None:
        """Copies an answer into the output, or says why there is none."""
        if reply.cancelled():
            return _Failure("CANCELLED", "the attempt was cancelled")
        error = reply.exception()
        if error is not None:
            return _Failure("CONNECTION", str(error))
        answer = reply.result()
        if answer.status != pb.STATUS_OK or answer.output is None:
            return _Failure(pb.Status.Name(answer.status).removeprefix("STATUS_"), answer.detail)
        self._stats.compute_us += answer.compute_us
        self._stats.queue_us += answer.queue_us
        self._output_ND[part.rows] = answer.output
        self._missing -= 1
        if self._missing == 0 and not self._finished.done():
            self._finished.set_result(None)
        return None

    def _pursue_all(self) -> None:
        """Patience is over: whoever has not answered is watched, one by one."""
        for part in self._parts:
            if part.reply is not None and not part.reply.done() and not part.pursued:
                self._start_pursuit(part)

    def _start_pursuit(self, part: Part) -> None:
        part.pursued = True
        task = asyncio.create_task(self._pursue(part))
        self._pursuits.add(task)
        task.add_done_callback(self._pursuits.discard)

    async def _pursue(self, part: Part) -> None:
        try:
            pause = pauses()
            failure = await self._outcome(part)
            while failure is not None:
                self._note(part, failure)
                self._send(part, await self._next_link(part, failure, pause))
                failure = await self._outcome(part)
        except ExpertUnavailable as error:
            if not self._finished.done():
                self._finished.set_exception(error)

    async def _outcome(self, part: Part) -> _Failure | None:
        """Waits for the attempt under way; leaves it when it takes long and somebody else can do it."""
        if part.reply is None:
            return _Failure("UNREACHABLE", self._pool.why_not(self._layer, part.expert))
        while not part.reply.done():
            if self._remaining_s() <= 0:
                raise self._unavailable(part, "no answer before the deadline")
            overdue_s = self._loop.time() - part.sent_s - self._patience.attempt_s
            if overdue_s >= 0 and self._others(part):
                # Not cancelled: whenever it answers, its link is trusted again.
                return _Failure("SLOW", f"no answer within {self._patience.attempt_s:g} s")
            wait_s = -overdue_s if overdue_s < 0 else self._patience.attempt_s
            await asyncio.wait((part.reply,), timeout=min(wait_s, self._remaining_s()))
        return self._take(part, part.reply)

    def _note(self, part: Part, failure: _Failure) -> None:
        """Counts a failure and remembers who it was. Raises ExpertUnavailable when it is final."""
        self._stats.retry_reasons[failure.kind] += 1
        who = "nobody" if part.link is None else part.link.replica.replica_id
        LOG.info("expert %d, layer %d at %s: %s", part.expert, self._layer, who, failure)
        if part.link is not None:
            part.tried.add(part.link.replica.replica_id)
            if failure.kind == "SLOW":
                part.link.mark_suspect()
            if failure.kind == "DRAINING":
                part.link.mark_draining()
        if failure.kind in _REJECTION_NAMES:
            part.rejections += 1
            if part.rejections >= MAX_REJECTIONS:
                raise self._unavailable(part, f"{part.rejections} times {failure.kind}: {failure.detail}")

    async def _next_link(self, part: Part, failure: _Failure, pause: Iterator[float]) -> ReplicaLink:
        """Somebody who has not been tried since the last change or pause. Raises ExpertUnavailable."""
        while True:
            changed = self._pool.changed
            fresh = self._others(part)
            if fresh:
                self._stats.retries += part.link is not None
                return fresh[0]
            remaining_s = self._remaining_s()
            if remaining_s <= 0 or self._pool.closed:
                raise self._unavailable(part, f"{failure.kind}: {failure.detail}")
            self._stats.waits += 1
            await self._pool.wait_for_change(changed, min(next(pause), remaining_s))
            part.tried.clear()

    def _others(self, part: Part) -> list[ReplicaLink]:
        able = self._pool.able(self._layer, part.expert)
        waiting = part.link if part.reply is not None and not part.reply.done() else None
        return [link for link in able if link is not waiting and link.replica.replica_id not in part.tried]

    def _unavailable(self, part: Part, reason: str) -> ExpertUnavailable:
        return ExpertUnavailable(part.expert, self._layer, reason)

    def _remaining_s(self) -> float:
        return self._deadline_s - self._loop.time()

    def _abandon(self) -> None:
        """Nobody waits any more: what is under way is ignored when it comes."""
        self._finished.cancel()
        for task in self._pursuits:
            task.cancel()
        for part in self._parts:
            if part.reply is not None:
                part.reply.cancel()


_REJECTION_NAMES = frozenset(pb.Status.Name(status).removeprefix("STATUS_") for status in _REJECTIONS)
