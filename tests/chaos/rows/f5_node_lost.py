"""F5: a Ray node with four experts is gone from one moment to the next, and Ray has not noticed yet."""

import asyncio

from tests.chaos.context import Context, Live
from tests.chaos.figures import Bar
from tests.chaos.nodes import NodesChaos, OnNodes
from tests.chaos.row import row


@row(
    "F5",
    fault="a Ray node with four experts removed without grace",
    promise="0 failed, 0 wrong tokens, redundancy back",
    bar=Bar(text="gap <= 1.5 s; <= 60 s", stall_ms=1500.0, recover_s=60.0),
    needs=OnNodes(),
    repeats=2,
)
async def a_node_lost(ctx: Context) -> None:
    """Then a new node comes, so that the next trial has as many."""
    cluster = ctx.cluster
    assert isinstance(cluster, NodesChaos)
    for _ in ctx.trials():
        await ctx.trial(remove_one)
        cluster.nodes.add()
        status = await cluster.status()
        ctx.note("; ".join(event for event in status.events if " again after " in event)[-120:])


async def remove_one(live: Live) -> None:
    """A node without a coordinator or a front door, and whichever of them."""
    cluster = live.cluster
    assert isinstance(cluster, NodesChaos)
    node = await cluster.expendable()
    await asyncio.sleep(live.rng.uniform(0.0, 0.5))
    live.begins()
    cluster.nodes.remove(node)
