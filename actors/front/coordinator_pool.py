"""The coordinators as one: who gets the next request, and what they all look like.

A request goes to the connected coordinator with the fewest tokens in flight, less some where its prompt's beginning was
probably computed before (`cluster.prefix_affinity`). When that one is lost the request goes on at another, with its
prompt and the tokens so far, or waits for one: whoever reads it sees one stream. How often is
`actors.front.resubmission`'s decision, where coordinators are now `actors.front.follower`'s work; refusing when they
are full is their own.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import Protocol

from actors.front.coordinator_client import CoordinatorLost
from actors.front.overload import Wanted
from actors.front.resubmission import Resubmission, Verdict
from cluster.prefix_affinity import PrefixAffinity
from cluster.prefix_hash import root_key
from protos.coordinator_pb2 import (
    Room,
    RoomQuestion,
    RoomReply,
    RoomRequest,
    SequenceOutput,
    SnapshotReply,
    Submit,
)

LOG = logging.getLogger(__name__)

SNAPSHOT_MAX_AGE_S = 1.0
READY_MAX_AGE_S = 30.0
# How long after the last coordinator was lost new requests still wait for the next one: that is twice what a restart
# takes. Later they are refused at once. A request that was begun waits as long as its caller does.
PATIENCE_S = 20.0
MIN_WAIT_S = 0.5
READY = "ready"
# Tokens in flight that a known beginning may outweigh: tokens of a prompt are cheaper than those that are generated.
MOST_KNOWN_TOKENS = 512
MOST_ROOM = 256  # requests that may come between two questions
ROOM_PATIENCE_S = 0.2


class Coordinator(Protocol):
    """What is asked of `actors.front.coordinator_client.CoordinatorClient`."""

    address: str

    @property
    def connected(self) -> bool:
        """True while its stream is up."""
        ...

    @property
    def inflight_tokens(self) -> int:
        """Tokens that it may still have to compute for us."""
        ...

    def watch(self, on_change: Callable[[], None]) -> None:
        """Calls `on_change` whenever its stream has come up or was lost."""
        ...

    def open(self) -> None:
        """Begins to connect, without waiting for it."""
        ...

    async def connect(self) -> None:
        """Waits until the stream is up. Raises CoordinatorLost."""
        ...

    def generate(self, submit: Submit) -> AsyncGenerator[SequenceOutput, None]:
        """Outputs of one request until its last; closing the generator cancels it. Raises CoordinatorLost."""
        ...

    async def snapshot(self) -> SnapshotReply:
        """Its counters. Raises CoordinatorLost."""
        ...

    async def room(self, questions: RoomRequest) -> RoomReply:
        """How many requests it would queue now. Raises CoordinatorLost."""
        ...

    async def close(self) -> None:
        """Ends the stream."""
        ...


class CoordinatorPool:
    """All coordinators of one cluster, used from one event loop. `resubmissions` counts them by reason."""

    def __init__(
        self,
        coordinators: Sequence[Coordinator],
        clock: Callable[[], float] = time.monotonic,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        if not coordinators:
            raise ValueError("a pool needs at least one coordinator")
        self._coordinators = tuple(coordinators)
        self._clock = clock
        self._patience_s = patience_s
        self._snapshots: dict[str, SnapshotReply] = {}
        self._taken_at: float | None = None
        self._refreshing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._alone_since: float | None = None
        self._affinity = PrefixAffinity()
        self.resubmissions: Counter[Verdict] = Counter()
        for one in coordinators:
            one.watch(self._wake)

    @property
    def all_connected(self) -> bool:
        """True while every coordinator's stream is up."""
        return all(one.connected for one in self._coordinators)

    @property
    def num_connected(self) -> int:
        """Coordinators whose stream is up."""
        return sum(one.connected for one in self._coordinators)

    async def wait_for_change(self) -> None:
        """Returns when a stream has come up or was lost, or the coordinators are others."""
        await self._changed.wait()

    async def follow(self, found: Mapping[str, Coordinator]) -> None:
        """Uses the coordinators at these addresses from now on; streams to others are ended, to the same kept.

        Values are clients that have not been opened; they are taken for addresses that are new. What a stream that
        is ended carried goes on elsewhere.
        """
        former = {one.address: one for one in self._coordinators}
        if former.keys() == found.keys():
            return
        self._coordinators = tuple(former.get(address) or one for address, one in found.items())
        self._taken_at = None
        for address in found.keys() - former.keys():
            found[address].watch(self._wake)
            found[address].open()
        self._wake()
        await asyncio.gather(*(one.close() for address, one in former.items() if address not in found))

    async def connect(self) -> None:
        """Connects to all that can be reached. Raises CoordinatorLost when there is none."""
        tries = await asyncio.gather(*(one.connect() for one in self._coordinators), return_exceptions=True)
        failures = [result for result in tries if result is not None]
        for failure in failures:
            LOG.warning("not connected: %s", failure)
        if len(failures) == len(self._coordinators):
            raise failures[0]

    async def close(self) -> None:
        """Ends every stream."""
        await asyncio.gather(*(one.close() for one in self._coordinators))

    async def generate(self, submit: Submit) -> AsyncGenerator[SequenceOutput, None]:
        """Outputs of one request, whatever becomes of coordinators; closing the generator cancels it.

        A refusal is passed on when all have refused, unless somebody had begun with the request: then it waits, as
        long as its caller does, or until the cluster's end sends it away. Raises CoordinatorLost when there has been
        nobody to begin with it for `patience_s`, or when coordinators are lost under it again and again.
        """
        way = Resubmission(submit)
        refused: dict[Coordinator, SequenceOutput] = {}
        while not way.ended:
            coordinator = await self._choose(way, refused)
            if coordinator is not None:
                async with aclosing(self._ask(coordinator, way, refused)) as outputs:
                    async for output in outputs:
                        yield output
            elif way.promised and not way.sent_away:
                refused.clear()
                await self._pause(way.refuse())
            else:
                yield list(refused.values())[-1]
                return
        if way.end is not None:
            yield way.end

    async def _ask(
        self, coordinator: Coordinator, way: Resubmission, refused: dict[Coordinator, SequenceOutput]
    ) -> AsyncGenerator[SequenceOutput, None]:
        """What one coordinator gives; `way` or `refused` know how it ended. Raises CoordinatorLost to give up."""
        verdict, why = Verdict.LOST, "it ended the request early"
        try:
            async with aclosing(coordinator.generate(way.submit)) as outputs:
                async for output in outputs:
                    judged = way.judge(output)
                    if judged is Verdict.REFUSED:
                        refused[coordinator] = output
                        return
                    if judged is not Verdict.TELL:
                        verdict, why = judged, output.error
                        break
                    yield output
                    if way.ended:
                        return
        except CoordinatorLost as error:
            why = str(error)
        if not way.lose(verdict, coordinator):
            raise CoordinatorLost(f"{why}; this request has lost too many coordinators")
        self.resubmissions[verdict] += 1
        LOG.warning("a request of %s goes on elsewhere: %s", coordinator.address, why)
        await self._pause(way.pause_s)

    async def _choose(self, way: Resubmission, refused: Collection[Coordinator]) -> Coordinator | None:
        """Who is asked next; None when all that are connected have refused. Raises CoordinatorLost."""
        while True:
            here = [one for one in self._coordinators if one.connected]
            alone_s = self._note_alone(bool(here))
            left = [one for one in here if one not in refused]
            if left:
                return self._least(left, way)
            if here or refused:
                return None
            for one in self._coordinators:
                one.open()
            if not way.promised and alone_s >= self._patience_s:
                raise CoordinatorLost(f"no coordinator has been connected for {alone_s:.0f} s")
            await self._pause(max(MIN_WAIT_S, self._patience_s - alone_s))

    def _least(self, left: Sequence[Coordinator], way: Resubmission) -> Coordinator:
        """Who has least to do, this request's prompt included."""
        if len(self._coordinators) == 1:
            return left[0]
        submit, affinity = way.submit, self._affinity
        keys = affinity.beginnings(root_key(submit.tenant, submit.cache_salt), submit.prompt_token_ids)
        chosen = min(
            left,
            key=lambda one: (
                one is way.avoid,
                one.inflight_tokens - min(MOST_KNOWN_TOKENS, affinity.known_tokens(keys, one.address)),
            ),
        )
        affinity.note(keys, chosen.address)
        return chosen

    async def _pause(self, at_most_s: float) -> None:
        """Waits for a change, but not longer than this, give or take a quarter: not all come back at once."""
        if at_most_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(at_most_s * random.uniform(0.75, 1.25)):
                    await self._changed.wait()

    def _note_alone(self, somebody_is_here: bool) -> float:
        """For how long no coordinator has been connected, in seconds."""
        if somebody_is_here:
            self._alone_since = None
            return 0.0
        if self._alone_since is None:
            self._alone_since = self._clock()
        return self._clock() - self._alone_since

    def _wake(self) -> None:
        self._note_alone(any(one.connected for one in self._coordinators))
        self._changed.set()
        self._changed = asyncio.Event()

    async def room(self, wanted: Sequence[Wanted]) -> list[Room]:
        """For each, what all coordinators that answer have together. Raises CoordinatorLost where none does."""
        questions = [RoomQuestion(tenant=one.tenant, num_tokens=one.num_tokens, most=MOST_ROOM) for one in wanted]
        request = RoomRequest(questions=questions)
        asked = [asyncio.ensure_future(one.room(request)) for one in self._coordinators if one.connected]
        replies = [reply.rooms for reply in await _answers(asked) if len(reply.rooms) == len(wanted)]
        if not replies:
            raise CoordinatorLost(f"none of {len(asked)} coordinators tells whether it has room")
        return [
            Room(
                num_requests=sum(one.num_requests for one in rooms),
                retry_after_ms=min(one.retry_after_ms for one in rooms),
            )
            for rooms in zip(*replies, strict=True)
        ]

    async def snapshots(self) -> dict[str, SnapshotReply]:
        """By address, of those that answer; at most `SNAPSHOT_MAX_AGE_S` old."""
        async with self._refreshing:
            if self._taken_at is None or self._clock() - self._taken_at > SNAPSHOT_MAX_AGE_S:
                replies = await asyncio.gather(*map(_snapshot, self._coordinators))
                found = zip(self._coordinators, replies, strict=True)
                self._snapshots = {one.address: reply for one, reply in found if reply is not None}
                self._taken_at = self._clock()
            return self._snapshots

    @property
    def last_snapshots(self) -> dict[str, SnapshotReply]:
        """What `snapshots` returned last, without asking."""
        return self._snapshots

    @property
    def last_snapshots_age_s(self) -> float:
        """How old those are; 0.0 while there are none."""
        return 0.0 if self._taken_at is None else self._clock() - self._taken_at

    @property
    def was_ready(self) -> bool:
        """True when some coordinator took requests a short time ago; asks nobody, so that a refusal is quick."""
        fresh = self._taken_at is not None and self._clock() - self._taken_at <= READY_MAX_AGE_S
        return fresh and any(reply.state == READY for reply in self._snapshots.values())

    async def is_ready(self) -> bool:
        """True when some coordinator takes requests."""
        return any(reply.state == READY for reply in (await self.snapshots()).values())


async def _answers(asked: Collection[asyncio.Future[RoomReply]]) -> list[RoomReply]:
    """Of those that answer soon, or else of the first. One that is frozen need not be waited for."""
    try:
        pending: Collection[asyncio.Future[RoomReply]] = asked
        if asked:
            _, pending = await asyncio.wait(asked, timeout=ROOM_PATIENCE_S)
        while len(pending) == len(asked) > 0:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        return [one.result() for one in asked if one.done() and one.exception() is None]
    finally:
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def _snapshot(coordinator: Coordinator) -> SnapshotReply | None:
    try:
        return await coordinator.snapshot()
    except CoordinatorLost as error:
        LOG.warning("no snapshot: %s", error)
        return None
