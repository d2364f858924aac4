"""O2: KV blocks for a quarter of what the sequences need: they take turns, and none says anything else for it."""

import asyncio
from dataclasses import replace

from tests.chaos.asks import Load
from tests.chaos.clusters import Served
from tests.chaos.context import Context
from tests.chaos.figures import Bar, Stream, wrong_tokens
from tests.chaos.player import ask_all, playing
from tests.chaos.row import row

STREAMS = 24
LOAD = Load(streams=STREAMS, per_lane=1, max_tokens=160, prompt_chars=96, arrivals=0, arrival_every_s=0)
BLOCK_TOKENS = 32
POOL_BLOCKS = STREAMS * -(-(LOAD.prompt_chars + 8 + LOAD.max_tokens) // BLOCK_TOKENS) // 4
BLOCK_BYTES = 2 * 4 * 2 * BLOCK_TOKENS * 16 * 4  # keys and values, layers, kv heads, positions, head size, fp32: tiny


@row(
    "O2",
    fault="KV pool a quarter of what is needed",
    promise="0 failed, 0 wrong tokens, everyone progresses",
    bar=Bar(text="0 failed, 0 wrong, with preemptions"),
    needs=Served(
        ("--replicas", "1", "--experts-per-actor", "4", "--kv-cache-gib", f"{POOL_BLOCKS * BLOCK_BYTES / 2**30}")
    ),
)
async def a_small_pool(ctx: Context) -> None:
    """All at once, compared with one after the other."""
    load = replace(LOAD, seed=ctx.seed)
    alone = replace(load, streams=1)
    golden = await ask_all(
        ctx.cluster.url, ctx.cluster.model_id, alone, [load.lane(lane, 0) for lane in range(STREAMS)]
    )
    for _ in ctx.trials():
        before = await _preemptions(ctx)
        async with playing(ctx.cluster.url, ctx.cluster.model_id, load) as player:
            streams: list[Stream] = await asyncio.gather(*(player.ask(load.lane(lane, 0)) for lane in range(STREAMS)))
        preempted = await _preemptions(ctx) - before
        ctx.note(f"{preempted} preemptions among {STREAMS} sequences over {POOL_BLOCKS} blocks")
        ctx.require(preempted > 0, "nobody was preempted: this proved nothing")
        ctx.count(
            failed=sum(stream.error is not None for stream in streams),
            wrong_tokens=sum(wrong_tokens(stream, golden[stream.key]) for stream in streams),
            requests=len(streams),
        )


async def _preemptions(ctx: Context) -> int:
    info = await ctx.cluster.info("coordinator-0")  # type: ignore[attr-defined]
    return int(info["preemptions_total"])
