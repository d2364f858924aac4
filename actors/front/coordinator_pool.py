"""The coordinators as one: who gets the next request, and what they all look like.

A request goes to the connected coordinator with the fewest tokens in flight, and to the next one when nothing
came of it there. Each coordinator's stream is `actors.front.coordinator_client`'s; refusing when they are full is
their own work.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from actors.front.coordinator_client import CoordinatorLost
from protos.coordinator_pb2 import SequenceOutput, SnapshotReply, Submit
from protos.expert_pb2 import STATUS_DRAINING, STATUS_OVERLOADED

LOG = logging.getLogger(__name__)

SNAPSHOT_MAX_AGE_S = 1.0
READY = "ready"


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

    async def connect(self) -> None:
        """Waits until the stream is up. Raises CoordinatorLost."""
        ...

    def generate(self, submit: Submit) -> AsyncGenerator[SequenceOutput, None]:
        """Outputs of one request until its last; closing the generator cancels it. Raises CoordinatorLost."""
        ...

    async def snapshot(self) -> SnapshotReply:
        """Its counters. Raises CoordinatorLost."""
        ...

    async def close(self) -> None:
        """Ends the stream."""
        ...


class CoordinatorPool:
    """All coordinators of one cluster, used from one event loop."""

    def __init__(self, coordinators: Sequence[Coordinator], clock: Callable[[], float] = time.monotonic) -> None:
        if not coordinators:
            raise ValueError("a pool needs at least one coordinator")
        self._coordinators = tuple(coordinators)
        self._clock = clock
        self._snapshots: dict[str, SnapshotReply] = {}
        self._taken_at: float | None = None
        self._refreshing = asyncio.Lock()

    @property
    def all_connected(self) -> bool:
        """True while every coordinator's stream is up."""
        return all(one.connected for one in self._coordinators)

    async def follow(self, addresses: Sequence[str], open_one: Callable[[str], Coordinator]) -> None:
        """Uses the coordinators at these addresses from now on; streams to others are ended, to the same kept."""
        former = {one.address: one for one in self._coordinators}
        self._coordinators = tuple(former.get(address) or open_one(address) for address in addresses)
        self._taken_at = None
        await asyncio.gather(*(one.close() for address, one in former.items() if address not in addresses))
        await self.connect()

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
        """Outputs of one request; closing the generator cancels it. Raises CoordinatorLost when its coordinator dies.

        Before the first output of a request nothing is lost, so a dead, draining or full coordinator only
        means that the next one is asked. A refusal is passed on when all have refused.
        """
        left = list(self._coordinators)
        while left:
            coordinator = min(left, key=lambda one: (not one.connected, one.inflight_tokens))
            left.remove(coordinator)
            started = False
            try:
                async with aclosing(coordinator.generate(submit)) as outputs:
                    async for output in outputs:
                        if left and not started and output.status in (STATUS_DRAINING, STATUS_OVERLOADED):
                            break
                        started = True
                        yield output
            except CoordinatorLost:
                if started or not left:
                    raise
            if started:
                return

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

    async def is_ready(self) -> bool:
        """True when some coordinator takes requests."""
        return any(reply.state == READY for reply in (await self.snapshots()).values())


async def _snapshot(coordinator: Coordinator) -> SnapshotReply | None:
    try:
        return await coordinator.snapshot()
    except CoordinatorLost as error:
        LOG.warning("no snapshot: %s", error)
        return None
