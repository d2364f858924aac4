"""Asks the coordinators whether there is room again, while requests are refused because there was none.

One question at a time, for all tenants that want to come in; without refusals nothing is asked. What is
refused meanwhile, and when a word is too old to count, is `actors.front.overload`'s decision.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from actors.front.coordinator_client import CoordinatorLost
from actors.front.overload import Overload, Wanted
from protos.coordinator_pb2 import Room

LOG = logging.getLogger(__name__)

ASK_S = 0.1
"""Between an answer and the next question: a question costs the coordinator about as much as a token does."""

Ask = Callable[[Sequence[Wanted]], Awaitable[Sequence[Room]]]
"""Room for each, in order. Raises CoordinatorLost."""


class RoomWatch:
    """Of one front door, in its event loop. `pause_s` lies between an answer and the next question."""

    def __init__(self, overload: Overload, ask: Ask, *, pause_s: float = ASK_S) -> None:
        self._overload = overload
        self._ask = ask
        self._pause_s = pause_s
        self._asking: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Somebody was refused."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Asks no more."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    async def _run(self) -> None:
        """Until nobody wants to come in."""
        while wanted := self._overload.ask():
            try:
                for one, room in zip(wanted, await self._ask(wanted), strict=True):
                    self._overload.note_room(one.tenant, room.num_requests, room.retry_after_ms / 1000)
            except CoordinatorLost as error:
                LOG.debug("whether there is room is not known: %s", error)
            await asyncio.sleep(self._pause_s)
