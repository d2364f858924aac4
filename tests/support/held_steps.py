"""Engines that stop between two steps until a test lets them go on: whoever is slow finds answers still under way."""

import asyncio
import itertools

from actors.coordinator.engine import Engine
from cluster.scheduler import ScheduledBatch


def hold_steps(engine: Engine | None, free: int = 0) -> asyncio.Event:
    """After `free` more steps none is computed until the event is set, however fast the machine is.

    A step whose sequences have all ended meanwhile is given up, as ever.
    """
    assert engine is not None, "it has not loaded yet"
    compute, gate, steps = engine._compute, asyncio.Event(), itertools.count(1)

    async def held(batch: ScheduledBatch) -> None:
        if next(steps) > free:
            await gate.wait()
        await compute(batch)

    object.__setattr__(engine, "_compute", held)
    return gate
