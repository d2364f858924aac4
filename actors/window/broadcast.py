"""One who looks, and all who watch: a frame every second for however many viewers, and nobody looks for none.

A viewer is given the newest frame whenever it is ready for one; those that came meanwhile it does not get, so that
nothing queues up. What a frame says is the caller's; HTTP is `actors.window.routes`'.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import NamedTuple

LOG = logging.getLogger(__name__)

PERIOD_S = 1.0
MAX_VIEWERS = 16
LIFE_S = 60.0
"""A stream ends by itself after so long and is asked for again: nothing waits longer for the end of one."""


class Frame(NamedTuple):
    """What all viewers get; after one that `ends`, their streams are over."""

    data: bytes
    ends: bool = False


class TooManyViewers(Exception):
    """As many watch as may."""


class Broadcast:
    """Used from one event loop. `look` makes a frame; one that raises is logged and asked again."""

    def __init__(
        self,
        look: Callable[[], Awaitable[Frame]],
        *,
        period_s: float = PERIOD_S,
        max_viewers: int = MAX_VIEWERS,
        life_s: float = LIFE_S,
    ) -> None:
        self.max_viewers = max_viewers
        self.num_viewers = 0
        self._look = look
        self._period_s = period_s
        self._life_s = life_s
        self._frame: Frame | None = None
        self._changed = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """The newest frame and each after it, until one ends the stream or it is `life_s` old.

        Close it to leave. Raises TooManyViewers at once when there is no place.
        """
        if self.num_viewers >= self.max_viewers:
            raise TooManyViewers
        self.num_viewers += 1
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._life_s
        try:
            if self._looking is None:
                self._looking = asyncio.create_task(self._run())
            while True:
                frame, changed = self._frame, self._changed
                if frame is not None:
                    yield frame.data
                    if frame.ends or loop.time() >= until_s:
                        return
                await changed.wait()
        finally:
            self.num_viewers -= 1
            if self.num_viewers == 0:
                await self.close()

    async def close(self) -> None:
        """Nobody looks any more, until somebody watches again."""
        looking, self._looking, self._frame = self._looking, None, None
        if looking is not None:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            next_s = loop.time() + self._period_s
            try:
                self._frame = await self._look()
            except Exception:
                LOG.exception("the dashboard could not be drawn; the next look follows")
            else:
                changed, self._changed = self._changed, asyncio.Event()
                changed.set()
            await asyncio.sleep(max(0.0, next_s - loop.time()))
