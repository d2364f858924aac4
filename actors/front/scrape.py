"""Looks at the cluster for /metrics: often enough to be true, seldom enough to cost nothing, and never for long.

Coordinators and supervisor are asked at most once a second however often the page is read, and a page does not wait for
one that is silent: it shows what was seen last. What it shows is `actors.front.metrics`' work.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from actors.supervision.status import ClusterStatus

LOG = logging.getLogger(__name__)

MAX_AGE_S = 1.0
"""Nobody is asked more often."""
MAX_WAIT_S = 1.0
"""A page waits no longer for an answer."""
FORGET_S = 30.0
"""What was seen before that is no longer shown."""

Look = Callable[[], Awaitable[ClusterStatus | None]]


async def nobody() -> ClusterStatus | None:
    """For a front door without a supervisor."""
    return None


class StatusWatch:
    """The supervisor's last word. `look` may take long, or raise."""

    def __init__(self, look: Look = nobody, clock: Callable[[], float] = time.monotonic) -> None:
        self._look = look
        self._clock = clock
        self._seen: ClusterStatus | None = None
        self._seen_s = self._asked_s = -float("inf")

    @property
    def last(self) -> ClusterStatus | None:
        """What was seen last, None where that is long ago."""
        return self._seen if self._clock() - self._seen_s <= FORGET_S else None

    @property
    def age_s(self) -> float:
        """For how long `last` has been known."""
        return self._clock() - self._seen_s

    async def refresh(self) -> None:
        """Looks again where it is time. Raises what `look` raises; what was seen before is then kept for a while."""
        if self._clock() - self._asked_s >= MAX_AGE_S:
            self._asked_s = self._clock()
            self._seen = await self._look()
            self._seen_s = self._clock()


class Scrape:
    """What a page of metrics looks at first: all of `looks`, together, one time at once however many pages are read."""

    def __init__(self, *looks: Callable[[], Awaitable[object]], max_wait_s: float = MAX_WAIT_S) -> None:
        self._looks = looks
        self._max_wait_s = max_wait_s
        self._looking: asyncio.Future[list[object]] | None = None

    async def refresh(self) -> None:
        """Returns when everybody has answered, or after `max_wait_s`; who is slow is still waited for, beside."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._look())
        await asyncio.wait({self._looking}, timeout=self._max_wait_s)

    async def close(self) -> None:
        """Gives up what is under way."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    async def _look(self) -> list[object]:
        found = await asyncio.gather(*(look() for look in self._looks), return_exceptions=True)
        for one in found:
            if isinstance(one, Exception):
                LOG.warning("a page of metrics shows what was seen before: %s: %s", type(one).__name__, one)
        return found
