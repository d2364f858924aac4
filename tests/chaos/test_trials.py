"""Trials against a server that lies on demand: a broken promise must be seen, and an honest run must be clean."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.chaos.asks import Load
from tests.chaos.context import Context, Live
from tests.chaos.figures import Bar, Finding, Trial
from tests.chaos.models import ChaosModel
from tests.chaos.player import GoldenFailed, playing, wait_until
from tests.chaos.row import Row
from tests.chaos.scripted_server import Script, ScriptedCluster, scripted_cluster
from tests.chaos.session import Session, Settings

LOAD = Load(streams=4, per_lane=2, max_tokens=12, arrivals=2, arrival_every_s=0.05, arrival_max_tokens=3)
WRONG_S = 0.2
PAUSE_S = 3.0
"""Longer than the machine stands still by itself."""


@dataclass(frozen=True)
class Scripted:
    """Needs a scripted server; how many were started is counted in `started`."""

    started: list[str]

    def __hash__(self) -> int:
        return 0

    @asynccontextmanager
    async def open(self, model: Path, home: Path) -> AsyncIterator[ScriptedCluster]:
        async with scripted_cluster() as cluster:
            self.started.append(cluster.url)
            yield cluster


def trial_of(inject: Callable[[Live], Awaitable[None]], *, idle: bool = False, bound_s: float = 60.0) -> Trial:
    """One trial, alone."""

    async def main() -> Trial:
        async with scripted_cluster() as cluster:
            return await context_of(cluster, bound_s).trial(inject, idle=idle, lead_s=0.05)

    return asyncio.run(main())


def context_of(cluster: ScriptedCluster, bound_s: float = 60.0) -> Context:
    return Context(
        row_id="X",
        cluster=cluster,
        seed=0,
        repeats=1,
        load=LOAD,
        goldens={},
        say=lambda text: None,
        golden_s=0.3,
        recover_timeout_s=bound_s,
    )


def misbehave(**changes: object) -> Callable[[Live], Awaitable[None]]:
    """So much misbehaviour for a while, and until somebody has had some of it; then none."""

    async def inject(live: Live) -> None:
        assert isinstance(live.cluster, ScriptedCluster)
        for name, value in changes.items():
            setattr(live.cluster.script, name, value)
        await asyncio.sleep(WRONG_S)
        await wait_until(lambda: not changes or live.cluster.script.misdeeds > 0, 60, "somebody misled")  # type: ignore[attr-defined]
        for name in changes:
            setattr(live.cluster.script, name, getattr(Script(), name))

    return inject


@pytest.mark.parametrize("idle", [False, True])
def test_an_honest_server_is_found_honest(idle: bool) -> None:
    trial = trial_of(misbehave(), idle=idle)
    assert (trial.failed, trial.wrong_tokens) == (0, 0)
    assert trial.requests > LOAD.streams
    assert trial.tokens >= trial.requests * 3
    assert trial.recover_s is not None


@pytest.mark.parametrize("how", ["wrong", "twice"])
def test_other_tokens_and_repeated_ones_are_counted(how: str) -> None:
    trial = trial_of(misbehave(**{how: True}))
    assert trial.failed == 0
    assert trial.wrong_tokens > 0


@pytest.mark.parametrize(("how", "value"), [("cut", True), ("error", True), ("status", 503)])
def test_answers_that_end_badly_have_failed(how: str, value: object) -> None:
    trial = trial_of(misbehave(**{how: value}))
    assert trial.failed > 0
    assert trial.wrong_tokens == 0
    assert sum(trial.errors.values()) == trial.failed


def test_a_pause_is_a_gap_and_a_stall() -> None:
    trial = trial_of(misbehave(pause_s=PAUSE_S))
    assert (trial.failed, trial.wrong_tokens) == (0, 0)
    assert trial.stall_ms > 0
    assert trial.gap_ms >= PAUSE_S * 1000 or trial.stall_ms >= PAUSE_S * 500  # it may come before the first tokens


def test_a_server_that_stays_slow_has_not_recovered() -> None:
    async def inject(live: Live) -> None:
        assert isinstance(live.cluster, ScriptedCluster)
        live.cluster.script.pause_s = 0.5

    trial = trial_of(inject, bound_s=1.5)
    assert trial.recover_s is None


def test_lanes_can_be_held_while_what_they_have_asked_goes_on() -> None:
    async def main() -> None:
        async with scripted_cluster() as cluster, playing(cluster.url, cluster.model_id, LOAD) as player:
            player.start()
            await player.until_flowing()
            async with player.only_begun() as begun:
                assert all(stream.tokens for stream in begun)
                num_asked = len(player.lanes)
                await wait_until(lambda: all(stream.whole for stream in player.lanes), 60, "all have ended")
                await asyncio.sleep(0.1)
                assert len(player.lanes) == num_asked
            await wait_until(lambda: len(player.lanes) >= num_asked + LOAD.streams, 60, "all ask again")

    asyncio.run(main())


def test_calls_are_counted_from_before_to_after() -> None:
    async def inject(live: Live) -> None:
        assert isinstance(live.cluster, ScriptedCluster)
        live.cluster.calls += 200
        live.cluster.extra += 3

    trial = trial_of(inject)
    assert (trial.calls, trial.extra_calls) == (200, 3)


def test_without_a_golden_run_there_is_no_trial() -> None:
    async def main() -> None:
        async with scripted_cluster() as cluster:
            cluster.script.cut = True
            with pytest.raises(GoldenFailed):
                await replace(context_of(cluster)).golden(replace(LOAD, streams=1))

    asyncio.run(main())


def findings_of(tmp_path: Path, needs: Scripted, *runs: Callable[[Context], Awaitable[None]]) -> list[Finding]:
    rows = [
        Row(id=f"X{n}", fault="f", promise="p", bar=Bar(text="b"), needs=needs, run=run, repeats=1, limit_s=200.0)
        for n, run in enumerate(runs)
    ]
    settings = Settings(model=ChaosModel("none", tmp_path, LOAD), home=tmp_path, golden_s=0.3)
    found: list[Finding] = []

    async def main() -> None:
        session = Session(settings, lambda text: None)
        try:
            await session.run(rows, found.append)
        finally:
            await session.close()

    asyncio.run(main())
    return found


def test_rows_share_a_cluster_until_one_of_them_breaks_it(tmp_path: Path) -> None:
    needs = Scripted([])

    async def fine(ctx: Context) -> None:
        for _ in ctx.trials():
            await ctx.trial(misbehave(), lead_s=0.05)

    async def breaks(ctx: Context) -> None:
        assert isinstance(ctx.cluster, ScriptedCluster)
        ctx.cluster.whole = False
        await ctx.trial(misbehave())

    async def stumbles(ctx: Context) -> None:
        ctx.count(failed=0)
        raise RuntimeError("a mistake in a row")

    async def demands(ctx: Context) -> None:
        ctx.count(stall_ms=3.0)
        ctx.require(False, "not what was promised")
        ctx.note("but this")

    first, second, third, fourth, fifth = findings_of(tmp_path, needs, fine, fine, breaks, stumbles, demands)
    assert first.held
    assert second.held
    assert first.repeats == 1
    assert not third.held
    assert "scripted to be broken" in third.note
    assert not fourth.held
    assert "RuntimeError: a mistake in a row" in fourth.note
    assert not fifth.held
    assert fifth.note == "not what was promised; but this"
    assert fifth.stall_p50_ms == 3.0
    assert len(needs.started) == 3
