"""F2: the only replica of an expert is killed: its sequences wait for the next one."""

import asyncio

from tests.chaos import faults
from tests.chaos.clusters import Served
from tests.chaos.context import Context, Live
from tests.chaos.figures import Bar
from tests.chaos.row import row


@row(
    "F2",
    fault="SIGKILL the only replica of an expert",
    promise="waits, 0 failed, 0 wrong tokens",
    bar=Bar(text="back <= 20 s, aim 5 s", recover_s=20.0),
    needs=Served(("--replicas", "1")),
    repeats=4,
)
async def the_only_replica_killed(ctx: Context) -> None:
    """Any of the eight, in decode."""
    for _ in ctx.trials():
        await ctx.trial(kill_one)


async def kill_one(live: Live) -> None:
    """Some replica, at some moment."""
    await asyncio.sleep(live.rng.uniform(0.0, 0.5))
    victim = live.rng.choice(await live.cluster.replicas())
    live.begins()
    faults.kill(victim.pid)
