"""The chaos suite's fast subset, in `make test`: a few faults on one shared cluster, every token compared. No times.

The whole table, with its times, is `make chaos`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

import pytest

from tests.chaos import faults
from tests.chaos.asks import Load
from tests.chaos.context import Context, Live
from tests.chaos.figures import Finding
from tests.chaos.models import tiny
from tests.chaos.player import wait_until
from tests.chaos.row import all_rows
from tests.chaos.rows.f1_expert_killed import Kill
from tests.chaos.rows.f3_replica_frozen import Freeze
from tests.chaos.rows.f6_network import reset_everything, reset_in_mid_message
from tests.chaos.rows.f7_coordinator_killed import kill_one
from tests.chaos.session import Session, Settings

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

LOAD = Load(streams=8, per_lane=1, max_tokens=64, arrivals=4)
FROZEN_S = 2.0
LONG = replace(LOAD, max_tokens=400, arrival_every_s=0.0)

Try = Callable[[str, Callable[[Context], Awaitable[None]]], Finding]


@pytest.fixture(scope="module")
def attempt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Try]:
    """Does something else on a row's cluster; rows in a row that need the same share it."""
    home = tmp_path_factory.mktemp("chaos")
    settings = Settings(model=replace(tiny(home), load=LOAD), home=home, golden_s=2.0)
    with asyncio.Runner() as runner:
        session = Session(settings, print)

        def run(row_id: str, work: Callable[[Context], Awaitable[None]]) -> Finding:
            return runner.run(session.run_row(replace(all_rows()[row_id], run=work)))

        yield run
        runner.run(session.close())


def assert_nothing_lost(finding: Finding, num_trials: int) -> None:
    assert (finding.repeats, finding.failed, finding.wrong_tokens) == (num_trials, 0, 0), finding


def test_killed_experts_change_no_token(attempt: Try) -> None:
    async def work(ctx: Context) -> None:
        await ctx.trial(Kill(3, "mid-message"))
        await ctx.trial(Kill(5, "prefill"))

    assert_nothing_lost(attempt("F1", work), 2)


def test_a_frozen_expert_changes_no_token(attempt: Try) -> None:
    async def work(ctx: Context) -> None:
        await ctx.trial(Freeze(FROZEN_S))

    assert_nothing_lost(attempt("F3", work), 1)


def test_connections_reset_in_mid_message_change_no_token(attempt: Try) -> None:
    async def work(ctx: Context) -> None:
        await ctx.trial(reset_in_mid_message)
        await ctx.trial(reset_everything)

    assert_nothing_lost(attempt("F6", work), 2)


async def kill_both_in_mid_answer(live: Live) -> None:
    """New requests wait for a coordinator only for as long as a restart takes on a machine that is not slow: there are
    none before the answers that were under way go on.
    """
    victims = await live.cluster.coordinators()
    hurt = False
    while not hurt:
        async with live.player.only_begun() as begun:
            hurt = bool(begun)
            if hurt:
                live.begins()
                for victim in victims:
                    faults.kill(victim.pid)
                await live.cluster.wait_whole()
                known = [(one, len(one.tokens)) for one in begun]
                await wait_until(
                    lambda known=known: all(len(one.tokens) > num or one.ended_s is not None for one, num in known),  # type: ignore[misc]
                    180,
                    "what was begun goes on",
                )


def test_killed_coordinators_change_no_token_and_repeat_none(attempt: Try) -> None:
    async def work(ctx: Context) -> None:
        await ctx.trial(kill_one)
        await ctx.trial(kill_both_in_mid_answer, load=LONG, lead_s=0.1)

    assert_nothing_lost(attempt("F7", work), 2)
