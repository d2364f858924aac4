"""F7: coordinators are killed in decode: their streams go on elsewhere, or wait for the next process."""

import asyncio
from collections.abc import Awaitable, Callable

from tests.chaos import faults
from tests.chaos.clusters import Served
from tests.chaos.context import Context, Live
from tests.chaos.figures import Bar
from tests.chaos.row import row

GAP_MS = 3000.0
ALONE_RECOVER_S = 20.0


@row(
    "F7",
    fault="SIGKILL the coordinator in decode: one of two, then both",
    promise="0 failed, 0 wrong tokens, no token twice",
    bar=Bar(text="gap <= 3 s + prefill with a second one"),
    needs=Served(("--coordinators", "2")),
    repeats=6,
)
async def a_coordinator_killed(ctx: Context) -> None:
    """Two of three trials kill one of the two; the third kills both, so that nobody is there to go on."""
    for number in ctx.trials():
        name, inject, limit_ms = _KINDS[number % len(_KINDS)]
        trial = await ctx.trial(inject)
        ctx.note(f"{name}: gap {trial.gap_ms:.0f} ms")
        ctx.require(limit_ms is None or trial.gap_ms <= limit_ms, f"{name}: gap more than {limit_ms} ms")
        back = trial.recover_s is not None and trial.recover_s <= ALONE_RECOVER_S
        ctx.require(limit_ms is not None or back, f"{name}: back later than {ALONE_RECOVER_S:g} s")


async def kill_one(live: Live) -> None:
    """Either of the two, at some moment."""
    await asyncio.sleep(live.rng.uniform(0.0, 0.5))
    victim = live.rng.choice(await live.cluster.coordinators())
    live.begins()
    faults.kill(victim.pid)


async def kill_both(live: Live) -> None:
    """At once."""
    victims = await live.cluster.coordinators()
    live.begins()
    for victim in victims:
        faults.kill(victim.pid)


_KINDS: tuple[tuple[str, Callable[[Live], Awaitable[None]], float | None], ...] = (
    ("one of two", kill_one, GAP_MS),
    ("one of two", kill_one, GAP_MS),
    ("both", kill_both, None),
)
