"""S1: the soak: faults of all kinds, one after the other, for ten minutes unless `--soak-s` says otherwise."""

import asyncio
import time
from collections import Counter

from actors.ray_runtime import RuntimeFailure
from tests.chaos import faults
from tests.chaos.clusters import Served
from tests.chaos.context import Context, Live
from tests.chaos.figures import Bar
from tests.chaos.row import row

KINDS = ("kill expert", "kill expert", "freeze expert", "slow expert", "kill in mid-message", "kill coordinator")


@row(
    "S1",
    fault="soak: random mix for 10 minutes (--soak-s)",
    promise="0 failed, 0 wrong tokens",
    bar=Bar(text="baseline <= 10 s after faults stop", recover_s=10.0),
    needs=Served(("--replicas", "2", "--coordinators", "2")),
    limit_s=3600.0,
)
async def a_soak(ctx: Context) -> None:
    """One trial, in which the faults do not wait for each other's recovery."""
    done: Counter[str] = Counter()
    trial = await ctx.trial(Mix(ctx.soak_s, done), waits_whole=False)
    faulty = ", ".join(f"{count} x {kind}" for kind, count in sorted(done.items()))
    ctx.note(f"{ctx.soak_s:g} s: {faulty}; {trial.requests} requests, {trial.tokens} tokens")
    await ctx.cluster.wait_whole()


class Mix:
    """Faults for so many seconds. An expert is hurt only while another replica has it, as is a coordinator: what
    happens to the last one is for other rows. Who cannot be hurt, or told, now is let be: it was hurt a moment ago.
    """

    def __init__(self, seconds: float, done: Counter[str], *, pause_s: tuple[float, float] = (1.0, 5.0)) -> None:
        self._seconds = seconds
        self._done = done
        self._pause_s = pause_s

    async def __call__(self, live: Live) -> None:
        end_s = time.monotonic() + self._seconds
        while time.monotonic() < end_s:
            kind = live.rng.choice(KINDS)
            try:
                pid = await _victim(live, "coordinator" in kind)
                if pid is not None:
                    await _hurt(live, kind, pid)
                    self._done[kind] += 1
            except ProcessLookupError:
                self._done["(gone already)"] += 1
            except (RuntimeFailure, TimeoutError):
                self._done["(no word of who is there)"] += 1
            await asyncio.sleep(live.rng.uniform(*self._pause_s))


async def _victim(live: Live, coordinator: bool) -> int | None:
    if coordinator:
        all_of_them = await live.cluster.coordinators()
        spare = [one for one in all_of_them if one.state == "ready"]
        return live.rng.choice(spare).pid if len(spare) > 1 else None
    replicas = [one for one in await live.cluster.replicas() if one.state == "ready"]
    held = Counter(expert for one in replicas for expert in one.expert_ids)
    spare = [one for one in replicas if all(held[expert] > 1 for expert in one.expert_ids)]
    return live.rng.choice(spare).pid if spare else None


async def _hurt(live: Live, kind: str, pid: int) -> None:
    if kind == "freeze expert":
        with faults.frozen(pid):
            await asyncio.sleep(live.rng.uniform(1.0, 6.0))
    elif kind == "slow expert":
        async with faults.slowed(pid, 10.0):
            await asyncio.sleep(live.rng.uniform(2.0, 6.0))
    elif kind == "kill in mid-message":
        await faults.kill_in_mid_message(pid)
    else:
        faults.kill(pid)
