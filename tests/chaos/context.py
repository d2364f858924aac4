"""What a row's function works with: trials on a shared cluster, compared with golden runs. See `tests.chaos.row`."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from tests.chaos.asks import Key, Load
from tests.chaos.clusters import Cluster, Counters, NotWhole
from tests.chaos.figures import (
    Answer,
    Stream,
    Trial,
    latency_back_s,
    token_rate,
    worst_first_s,
    worst_gap_s,
    wrong_tokens,
)
from tests.chaos.player import Player, ask_all, golden_of, playing

LEAD_S = 2.0
TAIL_S = 1.0
GOLDEN_S = 6.0
RECOVER_TIMEOUT_S = 90.0
POLL_S = 0.1

Inject = Callable[["Live"], Awaitable[None]]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Golden:
    """What a load's requests say on this cluster without a fault, and how long its streams then waited at worst."""

    answers: dict[Key, Answer]
    gap_s: float
    first_s: float
    rate: float


@dataclass(slots=True)
class Live:
    """A trial as its fault sees it. In an idle trial the player has not begun yet."""

    cluster: Cluster
    rng: random.Random
    player: Player
    began_s: float = field(default_factory=time.monotonic)
    over_s: float | None = None

    def begins(self) -> None:
        """The fault begins now, and not when its function was called."""
        self.began_s = time.monotonic()

    def over(self) -> None:
        """The fault ends now: from here recovery is measured."""
        self.over_s = time.monotonic()


@dataclass(slots=True)
class Context:
    """One row being run. `goldens` are shared by all rows on one cluster."""

    row_id: str
    cluster: Cluster
    seed: int
    repeats: int
    load: Load
    goldens: dict[Load, Golden]
    say: Say
    soak_s: float = 600.0
    golden_s: float = GOLDEN_S
    recover_timeout_s: float = RECOVER_TIMEOUT_S
    done: list[Trial] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rng(self) -> random.Random:
        """Randomness for the next trial: of the seed, the row and how many trials there were."""
        return random.Random(f"{self.seed}/{self.row_id}/{len(self.done)}")

    def trials(self) -> Iterator[int]:
        """Numbers of the trials to make."""
        yield from range(self.repeats)

    def note(self, text: str) -> None:
        """Words for the table."""
        self.notes.append(text)

    def require(self, holds: bool, what: str) -> None:
        """A promise beyond tokens and times; when it does not hold, neither does the row."""
        if not holds:
            self.broken.append(what)

    def count(self, **figures: float) -> None:
        """A trial without streams: `Trial`'s fields."""
        self._add(Trial(**figures))  # type: ignore[arg-type]

    async def trial(
        self,
        inject: Inject,
        *,
        load: Load | None = None,
        idle: bool = False,
        lead_s: float = LEAD_S,
        waits_whole: bool = True,
    ) -> Trial:
        """Plays `load` with the fault in its middle, compares, and appends the trial. Raises NotWhole, GoldenFailed.

        Without `waits_whole` recovery is only that tokens come as fast as before.
        """
        load = load or self.load
        await self.cluster.wait_whole()
        golden = await self.golden(load)
        before = await self.cluster.counters()
        async with playing(self.cluster.url, self.cluster.model_id, load) as player:
            live = Live(self.cluster, self.rng, player)
            await self._inject(live, inject, idle, lead_s)
            over_s = live.over_s or time.monotonic()
            whole = await self._recover(player, golden, over_s, waits_whole)
            await asyncio.sleep(TAIL_S)
            await player.finish()
            calls = (await self.cluster.counters()).since(before)
            await self._add_missing(load, golden, player)
            trial = judge(player.streams, golden, calls, live.began_s, over_s, whole)
        self._add(trial)
        if waits_whole:
            await self.cluster.wait_whole()
        return trial

    async def golden(self, load: Load) -> Golden:
        """The golden run, once per cluster and load: every request answered, for GOLDEN_S at least."""
        if load not in self.goldens:
            self.goldens[load] = await golden_run(self.cluster, load, self.golden_s)
            found = self.goldens[load]
            self.say(
                f"golden run: {len(found.answers)} requests, worst gap {found.gap_s * 1e3:.0f} ms, "
                f"worst first token {found.first_s * 1e3:.0f} ms, {found.rate:.0f} tok/s"
            )
        return self.goldens[load]

    async def _inject(self, live: Live, inject: Inject, idle: bool, lead_s: float) -> None:
        if not idle:
            live.player.start()
            await live.player.until_flowing()
            await asyncio.sleep(lead_s)
        live.begins()
        await inject(live)
        if idle:
            live.player.start()

    async def _recover(self, player: Player, golden: Golden, over_s: float, waits_whole: bool) -> float | None:
        """Seconds from the fault's end until the cluster is whole and its tokens come as fast as before."""
        deadline_s = over_s + self.recover_timeout_s
        whole_s = over_s
        if waits_whole:
            try:
                await self.cluster.wait_whole(max(1.0, deadline_s - time.monotonic()))
            except NotWhole as error:
                self.say(str(error))
                return None
            whole_s = time.monotonic()
        while (back_s := latency_back_s(player.lanes, golden.rate, over_s, time.monotonic())) is None:
            if time.monotonic() > deadline_s:
                self.say(f"tokens did not come as fast as before within {self.recover_timeout_s:g} s")
                return None
            await asyncio.sleep(POLL_S)
        return max(whole_s, back_s) - over_s

    async def _add_missing(self, load: Load, golden: Golden, player: Player) -> None:
        """Requests that the golden run did not have (a load without a bound has none of these)."""
        missing = {stream.key for stream in player.streams} - golden.answers.keys()
        if missing:
            golden.answers.update(await ask_all(self.cluster.url, self.cluster.model_id, load, sorted(missing)))

    def _add(self, trial: Trial) -> None:
        self.done.append(trial)
        recovered = "not in time" if trial.recover_s is None else f"{trial.recover_s:.1f} s"
        errors = "".join(f"; {count} x {name}" for name, count in trial.errors.items())
        self.say(
            f"trial {len(self.done)}: {trial.failed} of {trial.requests} failed, {trial.wrong_tokens} of "
            f"{trial.tokens} tokens wrong, gap {trial.gap_ms:.0f} ms, stall {trial.stall_ms:.0f} ms, "
            f"recovered {recovered}{errors}"
        )


async def golden_run(cluster: Cluster, load: Load, seconds: float) -> Golden:
    """Every request of the load, under the load itself. Raises GoldenFailed."""
    async with playing(cluster.url, cluster.model_id, load) as player:
        player.start()
        await player.until_flowing()
        began_s = time.monotonic()
        await asyncio.sleep(seconds)
        rate = token_rate(player.lanes, began_s, time.monotonic())
        wanted = set(load.keys())
        if load.arrival_every_s <= 0:
            wanted = {key for key in wanted if key[0] == "lane"}
        await player.finish()
    answers = {stream.key: golden_of(stream) for stream in player.streams}
    contradiction = [s.key for s in player.streams if wrong_tokens(s, answers[s.key])]
    assert not contradiction, f"without any fault, the same requests had different answers: {contradiction[:4]}"
    answers |= await ask_all(cluster.url, cluster.model_id, load, sorted(wanted - answers.keys()))
    return Golden(answers, worst_gap_s(player.streams), worst_first_s(player.streams), rate)


def judge(
    streams: list[Stream], golden: Golden, calls: Counters, began_s: float, over_s: float, recover_s: float | None
) -> Trial:
    """The trial's figures."""
    gap_s = worst_gap_s(streams)
    stall_s = max(0.0, gap_s - golden.gap_s, worst_first_s(streams) - golden.first_s)
    lanes = [stream for stream in streams if stream.key[0] == "lane"]
    return Trial(
        failed=sum(stream.error is not None for stream in streams),
        wrong_tokens=sum(wrong_tokens(stream, golden.answers[stream.key]) for stream in streams),
        gap_ms=gap_s * 1e3,
        stall_ms=stall_s * 1e3,
        recover_s=recover_s,
        extra_calls=calls.extra,
        calls=calls.calls,
        requests=len(streams),
        tokens=sum(len(stream.tokens) for stream in streams),
        errors=Counter(stream.error for stream in streams if stream.error is not None),
        rate_before=golden.rate,
        rate_during=token_rate(lanes, began_s, over_s),
    )
