"""F1: any expert replica is killed, at any moment, while its twin lives."""

import asyncio
import itertools
from dataclasses import replace

from tests.chaos import faults
from tests.chaos.clusters import NUM_EXPERTS, Served, holders, in_use
from tests.chaos.context import Context, Live
from tests.chaos.figures import Bar
from tests.chaos.row import row

MOMENTS = ("decode", "prefill", "mid-message", "idle")


@row(
    "F1",
    fault="SIGKILL any expert replica: each expert x idle, prefill, decode, mid-message",
    promise="0 failed, 0 wrong tokens",
    bar=Bar(text="worst gap <= 1 s, aim 100 ms above normal", gap_ms=1000.0),
    needs=Served(("--replicas", "2")),
    repeats=len(MOMENTS) * NUM_EXPERTS,
    limit_s=3600.0,
)
async def an_expert_killed(ctx: Context) -> None:
    """Every expert at every moment, or the first `repeats` of them, with an aim of 100 ms that the note reports."""
    cases = list(itertools.product(range(NUM_EXPERTS), MOMENTS))
    ctx.rng.shuffle(cases)
    for number in ctx.trials():
        expert, moment = cases[number % len(cases)]
        ctx.say(f"expert {expert}, {moment}")
        load = ctx.load if number % 2 else replace(ctx.load, streams=2 * ctx.load.streams, per_lane=1)
        await ctx.trial(Kill(expert, moment), load=load, idle=moment == "idle")
    within = sum(trial.stall_ms <= 100 for trial in ctx.done)
    ctx.note(f"{within} of {len(ctx.done)} stalls within 100 ms")


class Kill:
    """Kills one of an expert's replicas at a moment."""

    def __init__(self, expert: int, moment: str) -> None:
        self._expert = expert
        self._moment = moment

    async def __call__(self, live: Live) -> None:
        if self._moment == "idle":  # whoever would be asked first
            victim = (await holders(live.cluster, self._expert))[0]
        else:
            victim = await in_use(live.cluster, self._expert)
        live.begins()
        if self._moment == "prefill":
            live.player.burst(8)
            await asyncio.sleep(live.rng.uniform(0.02, 0.1))
        elif self._moment == "decode":
            await asyncio.sleep(live.rng.uniform(0.0, 0.5))
        if self._moment == "mid-message":
            await faults.kill_in_mid_message(victim.pid)
        else:
            faults.kill(victim.pid)
