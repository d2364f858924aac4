"""B1: one expert has half of every layer's rows, and the balancer is switched on; the load shifts, and goes."""

import asyncio
import time
from collections.abc import Callable

from actors.supervision.status import ClusterStatus
from tests.chaos.context import Context
from tests.chaos.figures import Bar
from tests.chaos.hot import HotChaos, OnHotNodes
from tests.chaos.row import row
from tests.support.hot_cluster import TOKEN, memory_of
from tests.support.hot_load import HotLoad
from tests.support.hot_model import EXPERTS, HOT_EVEN, HOT_ODD

WIDTH = 32
BASE_S = 10.0
RATE_S = 3.0
RECOVER_S = 20.0
GAIN = 1.6
WINDOW_INTERVALS = 3
SETTLE_S = 60.0
STILL_INTERVALS = 3
GONE_S = 120.0


@row(
    "B1",
    fault="one expert has half of each layer's rows; then another; then none",
    promise="throughput back, the map follows, copies drained",
    bar=Bar(text=">= 1.6x in 20 s, 0 failed, 0 wrong, no step > 2x; two windows; memory back"),
    needs=OnHotNodes(),
    limit_s=600.0,
)
async def a_hot_expert(ctx: Context) -> None:
    """What is not reached is said with its figure."""
    cluster = ctx.cluster
    assert isinstance(cluster, HotChaos)
    for _ in ctx.trials():
        first = await cluster.status()
        load = HotLoad(first.coordinators[0].address, TOKEN, width=WIDTH)
        try:
            await load.more(2 * WIDTH, 120.0)
            serving = memory_of(await cluster.status())  # what serving needs is touched by now, and copies are none
            ctx.note(f"experts' memory {serving / memory_of(first):.2f}x of what it was before the first request")
            await _switched_on(ctx, cluster, load)
            await _shifted(ctx, cluster, load)
            await _gone(ctx, cluster, load, serving)
        finally:
            await load.close()
            cluster.hot.supervisor.switch_balance("off")
        for text in (*load.failed[:1], *load.wrong[:1]):
            ctx.note(text)
        ctx.count(failed=len(load.failed), wrong_tokens=len(load.wrong), requests=load.answers)


async def _switched_on(ctx: Context, cluster: HotChaos, load: HotLoad) -> None:
    base_s = time.monotonic()
    await asyncio.sleep(BASE_S)
    on_s = time.monotonic()
    base, (_, normal_s) = load.rate(base_s, on_s), load.worst_step(base_s, on_s)
    normal_worst_s = max(load.steps(base_s, on_s))
    tokens = (await cluster.status()).load.window_tokens_per_expert
    share = max(tokens) / sum(tokens)
    ctx.require(share >= 0.4, f"the hot expert had {share:.0%} of the rows only")
    cluster.hot.supervisor.switch_balance("on")
    back_s = await _fast_again(load, base, on_s)
    found = "never" if back_s is None else f"after {back_s:.1f} s"
    ctx.require(back_s is not None and back_s <= RECOVER_S, f"{GAIN}x was reached {found}, not within {RECOVER_S:g} s")
    settled = await _settle(cluster)
    off_s = time.monotonic()
    worst_s, _ = load.worst_step(on_s, off_s)
    after_s = time.monotonic()
    await asyncio.sleep(BASE_S)
    now = await cluster.status()
    gain = load.rate(after_s, time.monotonic()) / base
    ctx.note(f"hot share {share:.0%}; {base:.0f} tokens/s before, {gain:.2f}x after; {GAIN}x {found}")
    ctx.note(
        f"longest step {worst_s * 1e3:.0f} ms while moving, median {normal_s * 1e3:.0f}, "
        f"longest without {normal_worst_s * 1e3:.0f}"
    )
    ctx.require(worst_s <= 2 * normal_s, f"a step took {worst_s / normal_s:.1f}x the median while moving")
    nodes = [one.node for one in now.replicas if one.expert_ids == [HOT_EVEN]]
    ctx.require(len(set(nodes)) == len(nodes) >= 2, f"the hot expert is on {len(set(nodes))} nodes")
    still = now.balance.moves_total - settled.balance.moves_total
    ctx.require(still == 0, f"{still} moves though the load was the same")
    ctx.note(f"{now.balance.moves_total} moves, {len(now.balance.failed)} failed")


async def _fast_again(load: HotLoad, base: float, on_s: float) -> float | None:
    """Seconds until tokens came GAIN times as fast, over RATE_S; None if that never was."""
    while (now_s := time.monotonic()) < on_s + SETTLE_S:
        if now_s - RATE_S >= on_s and load.rate(now_s - RATE_S, now_s) >= GAIN * base:
            return now_s - on_s
        await asyncio.sleep(0.2)
    return None


async def _settle(cluster: HotChaos) -> ClusterStatus:
    """Returns when nothing has moved for some intervals, or after a minute."""
    end_s = time.monotonic() + SETTLE_S
    before = await cluster.status()
    while time.monotonic() < end_s:
        await asyncio.sleep(STILL_INTERVALS * cluster.interval_s)
        now = await cluster.status()
        if now.balance.moves_total == before.balance.moves_total and not now.balance.proposed:
            return now
        before = now
    return before


async def _shifted(ctx: Context, cluster: HotChaos, load: HotLoad) -> None:
    limit_s = 2 * WINDOW_INTERVALS * cluster.interval_s
    before = _nodes(await cluster.status(), HOT_ODD)
    load.family = 1
    took_s = await _until(cluster, lambda now: _nodes(now, HOT_ODD) > before, GONE_S)
    ctx.note(f"the other expert had {before} nodes, and one more {took_s:.0f} s after the load had shifted")
    ctx.require(took_s <= limit_s, f"the map followed after {took_s:.0f} s, two windows are {limit_s:.0f} s")
    await load.more(WIDTH, 120.0)


async def _gone(ctx: Context, cluster: HotChaos, load: HotLoad, memory_bytes: int) -> None:
    load.family = None
    took_s = await _until(cluster, lambda now: len(now.replicas) == EXPERTS, GONE_S)
    now = memory_of(await cluster.status())
    ctx.require(took_s < GONE_S, f"after {GONE_S:g} s there were still copies")
    ctx.note(f"copies were drained {took_s:.0f} s after the load had gone; memory {now / memory_bytes:.2f}x")
    ctx.require(now <= 1.15 * memory_bytes, f"experts' memory is {now / memory_bytes:.2f}x what it was")


def _nodes(status: ClusterStatus, expert: int) -> int:
    return len({one.node for one in status.replicas if one.expert_ids == [expert] and one.state == "ready"})


async def _until(cluster: HotChaos, holds: Callable[[ClusterStatus], bool], limit_s: float) -> float:
    """Seconds until it held, at most the limit."""
    began_s = time.monotonic()
    while time.monotonic() < began_s + limit_s:
        if holds(await cluster.status()):
            break
        await asyncio.sleep(0.2)
    return time.monotonic() - began_s
