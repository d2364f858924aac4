"""F4: a replica gets a tenth of the time that the others get."""

import asyncio
import time
from dataclasses import dataclass

from tests.chaos import faults
from tests.chaos.clusters import NUM_EXPERTS, Served, in_use
from tests.chaos.context import Context, Live
from tests.chaos.figures import Bar, token_rate
from tests.chaos.row import row

FACTOR = 10.0
SLOW_S = 20.0
LEAST_THROUGHPUT = 0.8


@row(
    "F4",
    fault="a replica made 10x slower, for 20 s",
    promise="ejected; others unaffected",
    bar=Bar(text="throughput >= 80 % of healthy"),
    needs=Served(("--replicas", "2")),
    repeats=4,
)
async def a_replica_slow(ctx: Context) -> None:
    """Throughput is counted from the first slow moment, so finding out is part of it; healthy is just before."""
    for _ in ctx.trials():
        slow = Slow()
        trial = await ctx.trial(slow)
        share = trial.rate_during / slow.healthy_rate
        ctx.note(f"throughput {share:.0%}")
        ctx.require(share >= LEAST_THROUGHPUT, f"throughput below {LEAST_THROUGHPUT:.0%} of healthy")


@dataclass(slots=True)
class Slow:
    """Some replica, after as long a time without a fault, whose tokens per second are kept."""

    healthy_rate: float = 0.0

    async def __call__(self, live: Live) -> None:
        victim = await in_use(live.cluster, live.rng.randrange(NUM_EXPERTS))
        from_s = time.monotonic()
        await asyncio.sleep(SLOW_S)
        self.healthy_rate = token_rate(live.player.lanes, from_s, time.monotonic())
        live.begins()
        async with faults.slowed(victim.pid, FACTOR):
            await asyncio.sleep(SLOW_S)
