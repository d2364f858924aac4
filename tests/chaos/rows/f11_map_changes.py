"""F11: replicas join and leave the map every second, in the middle of decode."""

import asyncio

from tests.chaos.context import Context, Live
from tests.chaos.figures import Bar
from tests.chaos.plain import Plain, PlainChaos
from tests.chaos.row import row

CHANGES = 15
EVERY_S = 1.0
FACTOR = 2.0


@row(
    "F11",
    fault="replicas added and removed every second during decode",
    promise="0 failed, 0 wrong tokens",
    bar=Bar(text="no step > 2x normal"),
    needs=Plain(copies=2, groups=4, proxied=False),
    repeats=2,
)
async def the_map_changes(ctx: Context) -> None:
    """A step shows as a gap between tokens; normal is the longest of the golden run, prefill of others included."""
    for _ in ctx.trials():
        normal_ms = (await ctx.golden(ctx.load)).gap_s * 1e3
        trial = await ctx.trial(change_the_map)
        ctx.note(f"longest step {trial.gap_ms:.0f} ms, normally {normal_ms:.0f} ms")
        ctx.require(trial.gap_ms <= FACTOR * normal_ms, f"a step was longer than {FACTOR:g}x the longest normal one")


async def change_the_map(live: Live) -> None:
    """Every second each expert has the one replica, the other, or both; in the end all."""
    cluster = live.cluster
    assert isinstance(cluster, PlainChaos)
    groups: dict[str, list[str]] = {}
    for replica_id in cluster.replica_ids:
        groups.setdefault(replica_id.rpartition("-")[0], []).append(replica_id)
    for _ in range(CHANGES):
        chosen = [
            one for copies in groups.values() for one in live.rng.sample(copies, live.rng.randint(1, len(copies)))
        ]
        await cluster.publish(chosen)
        await asyncio.sleep(EVERY_S)
    await cluster.publish(cluster.replica_ids)
