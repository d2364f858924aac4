"""F3: a replica is frozen for 20 s: its connections stay up and it says nothing."""

import asyncio

from tests.chaos import faults
from tests.chaos.clusters import NUM_EXPERTS, Served, in_use
from tests.chaos.context import Context, Live
from tests.chaos.figures import Bar
from tests.chaos.row import row

FROZEN_S = 20.0


@row(
    "F3",
    fault="SIGSTOP a replica, SIGCONT 20 s later",
    promise="hedged, ejected, re-admitted",
    bar=Bar(text="gap <= 0.5 s above normal", stall_ms=500.0),
    needs=Served(("--replicas", "2")),
    repeats=4,
)
async def a_replica_frozen(ctx: Context) -> None:
    """Recovery counts from SIGCONT and ends when every coordinator trusts every replica again."""
    for _ in ctx.trials():
        await ctx.trial(Freeze(FROZEN_S))


class Freeze:
    """Freezes some replica for so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def __call__(self, live: Live) -> None:
        victim = await in_use(live.cluster, live.rng.randrange(NUM_EXPERTS))
        live.begins()
        with faults.frozen(victim.pid):
            await asyncio.sleep(self._seconds)
