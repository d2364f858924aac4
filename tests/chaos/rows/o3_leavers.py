"""O3: a thousand clients leave at any moment; nothing of theirs is left."""

import asyncio
import time
from typing import Any

import psutil

from tests.chaos.clusters import Served
from tests.chaos.context import Context
from tests.chaos.figures import Bar
from tests.chaos.row import row
from tests.support.leavers import leave_all

COUNT = 1000
AT_ONCE = 64
IDLE_S = 20.0
SPARE_DESCRIPTORS = 16  # connections that are kept alive, and those of whoever looks


@row(
    "O3",
    fault="1,000 disconnects at random moments",
    promise="0 KV blocks, queue places, streams leaked",
    bar=Bar(text="idle <= 20 s, descriptors as before", recover_s=IDLE_S),
    needs=Served(("--replicas", "1", "--experts-per-actor", "4", "--max-num-seqs", "16")),
)
async def leavers(ctx: Context) -> None:
    """In the request's head and body, in the queue, in prefill and decode, streaming or not, politely or not."""
    body = {
        "model": ctx.cluster.model_id,
        "prompt": "The quick brown fox " * 6,
        "max_tokens": 100,
        "ignore_eos": True,
    }
    await leave_all(ctx.cluster.url, body, count=AT_ONCE, at_once=AT_ONCE, seed=-1)  # what is opened once, is open
    await _idle(ctx)
    for number in ctx.trials():
        before = _descriptors(ctx)
        left = await leave_all(ctx.cluster.url, body, count=COUNT, at_once=AT_ONCE, seed=ctx.seed + number)
        over_s = time.monotonic()
        info = await _idle(ctx)
        back_s = time.monotonic() - over_s
        held = info["kv_blocks_total"] - info["kv_blocks_free"]
        leaked = _descriptors(ctx) - before
        ctx.note(", ".join(f"{count} {moment}" for moment, count in sorted(left.items())))
        ctx.require(held == 0, f"{held} KV blocks are held")
        ctx.require(
            info["num_running"] == info["num_waiting"] == 0, f"{info['num_running']} run, {info['num_waiting']} wait"
        )
        ctx.require(leaked <= SPARE_DESCRIPTORS, f"{leaked} descriptors more than before")
        ctx.count(recover_s=back_s, requests=COUNT)


async def _idle(ctx: Context) -> Any:
    """What the coordinator says once nothing is under way, or after IDLE_S."""
    deadline_s = time.monotonic() + IDLE_S
    while True:
        info: Any = await ctx.cluster.info("coordinator-0")  # type: ignore[attr-defined]
        if (info["num_running"], info["num_waiting"]) == (0, 0) or time.monotonic() > deadline_s:
            await asyncio.sleep(6)  # connections that nobody uses are closed after five seconds
            return await ctx.cluster.info("coordinator-0")  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)


def _descriptors(ctx: Context) -> int:
    total = 0
    for one in ctx.cluster.served.processes():  # type: ignore[attr-defined]
        try:
            total += one.num_fds()
        except psutil.Error:
            continue
    return total
