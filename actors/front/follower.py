"""Finds the coordinators again: while one is away, asks where they are now, at once and then again and again.

A coordinator that was replaced is a new process at another address; requests of the old one wait for it in the pool.
Whom to ask is the owner's knowledge (`actors.ingress`), what is done with the answer `actors.front.coordinator_pool`'s.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from actors.front.coordinator_pool import Coordinator, CoordinatorPool

LOG = logging.getLogger(__name__)

MIN_PAUSE_S = 0.1
MAX_PAUSE_S = 1.0

Look = Callable[[], Awaitable[Mapping[str, Coordinator]]]
"""Unopened clients by address of all coordinators that take requests; raises when nobody knows."""


async def keep_following(
    pool: CoordinatorPool, look: Look, num_coordinators: int, *, again_s: float | None = None
) -> None:
    """Runs until it is cancelled. There should be `num_coordinators`; as long as there are, nobody is asked.

    With `again_s` it is asked so often all the same: there may be more than there should be at least.
    """
    pause_s = MIN_PAUSE_S
    while True:
        if pool.all_connected and pool.num_connected >= num_coordinators:
            pause_s = MIN_PAUSE_S
            if await _changed(pool, again_s):
                continue
        try:
            await pool.follow(await look())
        except Exception as error:  # noqa: BLE001 - the top of the loop: whatever is wrong may be right in a second
            LOG.warning("where the coordinators are is not known: %s: %s", type(error).__name__, error)
        await asyncio.sleep(pause_s)
        pause_s = min(MAX_PAUSE_S, 2 * pause_s)


async def _changed(pool: CoordinatorPool, within_s: float | None) -> bool:
    """Waits for a change, but not longer than this."""
    try:
        async with asyncio.timeout(within_s):
            await pool.wait_for_change()
    except TimeoutError:
        return False
    return True
