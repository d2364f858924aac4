"""F9: Ray's head is away for a minute, and an expert with a standby dies meanwhile."""

import asyncio

from tests.chaos import faults
from tests.chaos.clusters import in_use
from tests.chaos.context import Context, Live
from tests.chaos.figures import Bar
from tests.chaos.nodes import NodesChaos, OnNodes
from tests.chaos.row import row

AWAY_S = 60.0


@row(
    "F9",
    fault="head process down 60 s with GCS fault tolerance, one expert killed meanwhile",
    promise="0 failed, 0 wrong tokens",
    bar=Bar(text="0 failed, 0 wrong", recover_s=60.0),
    needs=OnNodes(),
)
async def the_head_away(ctx: Context) -> None:
    """Who is found by name, started or counted needs the head; who serves does not."""
    for _ in ctx.trials():
        await ctx.trial(kill_head_then_expert)


async def kill_head_then_expert(live: Live) -> None:
    """Recovery is counted from the head's return."""
    cluster = live.cluster
    assert isinstance(cluster, NodesChaos)
    victim = await in_use(cluster, live.rng.randrange(8))
    live.begins()
    cluster.nodes.kill_head()
    await asyncio.sleep(AWAY_S / 3)
    faults.kill(victim.pid)
    await asyncio.sleep(2 * AWAY_S / 3)
    cluster.nodes.revive_head()
