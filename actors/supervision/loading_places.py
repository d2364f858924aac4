"""How many copies may load at one time: a bound in all, and one on each machine.

Nodes of one machine share its processors, and two processes that start at once are felt by those who serve there.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

MAX_LOADING = 4


class LoadingPlaces:
    """Places, given in the order of asking."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(MAX_LOADING)
        self._machines: dict[str, asyncio.Lock] = {}

    @asynccontextmanager
    async def one_on(self, machine: str) -> AsyncIterator[None]:
        """A place on that machine."""
        async with self._machines.setdefault(machine, asyncio.Lock()), self._all:
            yield
