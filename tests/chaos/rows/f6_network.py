"""F6: what networks do between a coordinator and its experts, over gRPC and through a fault proxy."""

import asyncio
from collections.abc import Awaitable, Callable

from tests.chaos.clusters import NUM_EXPERTS, in_use
from tests.chaos.context import Context, Live
from tests.chaos.figures import Bar
from tests.chaos.plain import Plain, PlainChaos
from tests.chaos.proxy import BLACKOUT, CALM, Weather
from tests.chaos.row import row

SILENCE_S = 5.0
LOSSY_S = 10.0
LOST_SHARE = 0.05
RESET_GAP_MS = 1000.0


@row(
    "F6",
    fault="proxy: 5 s blackout, one-way silence, reset in mid-message, 5 % of connections lost",
    promise="0 failed, 0 wrong tokens",
    bar=Bar(text="gap <= blackout + 1 s", gap_ms=(SILENCE_S + 1.0) * 1e3),
    needs=Plain(copies=2, groups=2),
    repeats=7,
)
async def a_bad_network(ctx: Context) -> None:
    """Each kind of fault in turn. Where no silence is the cause, the bar is 1 s."""
    assert isinstance(ctx.cluster, PlainChaos)
    for number in ctx.trials():
        name, inject, limit_ms = _KINDS[number % len(_KINDS)]
        ctx.say(name)
        trial = await ctx.trial(inject)
        ctx.note(f"{name}: gap {trial.gap_ms:.0f} ms")
        ctx.require(trial.gap_ms <= limit_ms, f"{name}: gap more than {limit_ms:.0f} ms")


def silence(weather: Weather, *, everywhere: bool) -> Callable[[Live], Awaitable[None]]:
    """That weather for SILENCE_S seconds, at every replica or at the copies that do the work."""

    async def inject(live: Live) -> None:
        cluster = plain(live)
        copy = (await in_use(cluster, 0)).name[-2:]
        live.begins()
        cluster.turn(weather, [one for one in cluster.replica_ids if everywhere or one.endswith(copy)])
        try:
            await asyncio.sleep(SILENCE_S)
        finally:
            cluster.turn(CALM)

    return inject


async def reset_in_mid_message(live: Live) -> None:
    """Every connection of one replica, cut within a message."""
    victim = await in_use(live.cluster, live.rng.randrange(NUM_EXPERTS))
    live.begins()
    plain(live).proxies[victim.name].reset_in_mid_message()


async def lose_connections(live: Live) -> None:
    """For LOSSY_S seconds, each connection dies with a probability of 5 % a second, and 5 % of the new ones at once."""
    cluster = plain(live)
    cluster.turn(Weather(loses_connection=LOST_SHARE))
    try:
        for _ in range(int(LOSSY_S)):
            for proxy in cluster.proxies.values():
                proxy.lose_connections(LOST_SHARE)
            await asyncio.sleep(1.0)
    finally:
        cluster.turn(CALM)


async def reset_everything(live: Live) -> None:
    """Every connection to every replica, at once."""
    for proxy in plain(live).proxies.values():
        proxy.reset_in_mid_message()


def plain(live: Live) -> PlainChaos:
    """The cluster of this row."""
    assert isinstance(live.cluster, PlainChaos)
    return live.cluster


_SILENT_GAP_MS = (SILENCE_S + 1.0) * 1e3
_KINDS: tuple[tuple[str, Callable[[Live], Awaitable[None]], float], ...] = (
    ("reset in mid-message", reset_in_mid_message, RESET_GAP_MS),
    ("blackout of everything", silence(BLACKOUT, everywhere=True), _SILENT_GAP_MS),
    ("blackout of one copy", silence(BLACKOUT, everywhere=False), _SILENT_GAP_MS),
    ("silence towards the experts", silence(Weather(silent_to_server=True), everywhere=False), _SILENT_GAP_MS),
    ("silence of the experts", silence(Weather(silent_to_client=True), everywhere=False), _SILENT_GAP_MS),
    ("5 % of connections lost", lose_connections, RESET_GAP_MS),
    ("reset of every connection", reset_everything, RESET_GAP_MS),
)
