"""O1: ten times the load that can be served, for a minute, then four fifths of it: nobody hangs, and it passes.

A refusal is timed from when its request was sent. What the clients' own event loop was late by, which they cannot help
adding, is told beside it.
"""

import asyncio
import os
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from actors.front.proxy_hold import REFUSER_HEADER
from tests.chaos.clusters import Cluster, Served, ServedChaos
from tests.chaos.context import Context
from tests.chaos.figures import Bar, percentile
from tests.chaos.row import row

FULL = 32  # requests side by side that keep every place taken
PEAK_S = 30.0
CALM_S = 15.0
SPIKE_S = 60.0
AFTER_S = 30.0
NORMAL_WITHIN_S = 10.0
TIMES = 10.0
CALM_LOAD = 0.8
ANSWER_TIMEOUT_S = 90.0
REJECT_LIMIT_S = 0.1
LEAST_GOODPUT = 0.9
GROWTH_LIMIT_BYTES = 256 << 20
PROMPT = "The quick brown fox jumps over the lazy dog. " * 2
LAG_EVERY_S = 0.01
EARLY_S = 2.0  # who is refused earlier may be the first to find out
EVENT = b"data: {"
"""What every token of a stream begins with."""


@dataclass(slots=True)
class Asked:
    """One request: when, what came of it, how long its first byte of an answer took, and when its tokens came.

    `sent_s` is when it was on its way, `at_s` when it was meant to be. `refuser` is what a refusal says of who made it.
    """

    at_s: float
    sent_s: float = 0.0
    status: int = 0
    first_s: float | None = None
    tokens_s: list[float] = field(default_factory=list)
    retry_after: bool = False
    hung: bool = False
    refuser: str = ""


@dataclass(slots=True)
class Crowd:
    """Clients that do not wait for each other. Goodput is in tokens of answers that came whole."""

    session: aiohttp.ClientSession
    cluster: Cluster
    max_tokens: int
    asked: list[Asked] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def one(self) -> Asked:
        """Asks, and reads to the end."""
        mine = Asked(time.monotonic())
        self.asked.append(mine)
        body = {
            "model": self.cluster.model_id,
            "prompt": PROMPT,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        try:
            url = f"{self.cluster.url}/v1/completions"
            async with self.session.post(url, json=body, trace_request_ctx=mine) as response:
                mine.retry_after = "Retry-After" in response.headers
                mine.refuser = response.headers.get(REFUSER_HEADER, "")
                async for piece in response.content.iter_any():
                    now_s = time.monotonic()
                    mine.first_s = mine.first_s or now_s - mine.at_s
                    mine.tokens_s += [now_s] * piece.count(EVENT)
                mine.status = response.status
        except TimeoutError:
            mine.hung = True
        except (aiohttp.ClientError, OSError):
            mine.status = -1
        return mine

    async def full(self, seconds: float) -> float:
        """Every place taken for so long: tokens per second in the second half."""
        end_s = time.monotonic() + seconds

        async def lane() -> None:
            while time.monotonic() < end_s:
                if (await self.one()).status != 200:
                    await asyncio.sleep(0.5)

        began_s = time.monotonic()
        lanes = [asyncio.create_task(lane()) for _ in range(FULL)]
        await asyncio.gather(*lanes)
        return self.tokens(began_s + seconds / 2, end_s) / (seconds / 2)

    async def offer(self, tokens_per_s: float, seconds: float) -> None:
        """New requests at such a pace, whatever becomes of them."""
        began_s, rate = time.monotonic(), tokens_per_s / self.max_tokens
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began_s + number / rate - time.monotonic()))
            task = asyncio.create_task(self._one())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _one(self) -> None:
        await self.one()

    def tokens(self, start_s: float, stop_s: float) -> int:
        """How many tokens came in that time, of answers that were or will be finished."""
        return sum(start_s <= at_s < stop_s for a in self.asked if a.status == 200 for at_s in a.tokens_s)

    def first_s(self, start_s: float, stop_s: float) -> list[float]:
        """How long the first tokens took of those answered who came in that time."""
        chosen = [a for a in self.asked if a.status == 200 and start_s <= a.at_s < stop_s]
        return [a.first_s for a in chosen if a.first_s is not None]


def _noting_when_sent() -> aiohttp.TraceConfig:
    async def sent(_: Any, context: Any, __: Any) -> None:
        context.trace_request_ctx.sent_s = time.monotonic()

    trace = aiohttp.TraceConfig()
    trace.on_request_chunk_sent.append(sent)
    return trace


async def _late_by(lags: list[float]) -> None:
    """Until it is cancelled: how much later than asked this event loop comes round."""
    while True:
        due_s = time.monotonic() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        lags.append(time.monotonic() - due_s)


class Cpu:
    """What the cores do: refusals, clients and the model share them, which is why goodput is less than the peak."""

    def __init__(self, cluster: Cluster) -> None:
        assert isinstance(cluster, ServedChaos), "the row needs Served"
        self._parts = {
            name: [one for title in titles for one in cluster.processes(title)] for name, titles in PARTS.items()
        }
        self.restart()

    def restart(self) -> None:
        """Counts from now."""
        self._at_s = time.monotonic()
        self._before = self._seconds()

    def since(self) -> str:
        """Cores used since the beginning, by who used them."""
        took_s = time.monotonic() - self._at_s
        used = {name: (seconds - self._before[name]) / took_s for name, seconds in self._seconds().items()}
        return ", ".join(f"{name} {cores:.2f}" for name, cores in used.items()) + " cores"

    def _seconds(self) -> dict[str, float]:
        mine = os.times()
        seconds = {"client": mine.user + mine.system}
        for name, processes in self._parts.items():
            seconds[name] = sum(one.user + one.system for one in (process.cpu_times() for process in processes))
        return seconds


PARTS = {"front": ("ray::ProxyActor", "ray::ServeReplica"), "model": ("ray::Coordinator", "ray::ExpertProcess")}
"""Titles of the processes that each part of the cluster consists of."""


@row(
    "O1",
    fault="10x offered load for 60 s, then 0.8x",
    promise="goodput >= 90 % of peak, rejects <= 100 ms, 0 hung sockets, memory bounded; normal again",
    bar=Bar(text="normal again <= 10 s", recover_s=NORMAL_WITHIN_S),
    needs=Served(("--replicas", "1", "--experts-per-actor", "4", "--max-num-seqs", "16")),
    limit_s=900.0,
)
async def a_spike(ctx: Context) -> None:
    """Peak, calm, spike, calm; everything at the client, memory at the processes."""
    timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=timeout, trace_configs=[_noting_when_sent()]
    ) as session:
        crowd = Crowd(session, ctx.cluster, ctx.load.overload_tokens)
        cpu = Cpu(ctx.cluster)
        peak = await crowd.full(PEAK_S)
        ctx.note(f"CPU at the peak: {cpu.since()}")
        ctx.say(f"peak {peak:.1f} tokens/s")
        if peak == 0:
            raise AssertionError(f"no token in {PEAK_S / 2:.0f} s")
        calm_s = time.monotonic()
        await crowd.offer(CALM_LOAD * peak, CALM_S)
        memory = await asyncio.to_thread(_memory, ctx.cluster)  # it takes a while to look at so many processes
        lags: list[float] = []
        late = asyncio.create_task(_late_by(lags))
        spike_s = time.monotonic()
        cpu.restart()
        await crowd.offer(TIMES * peak, SPIKE_S)
        over_s = time.monotonic()
        ctx.note(f"CPU in the spike: {cpu.since()}")
        late.cancel()
        grown = await asyncio.to_thread(_memory, ctx.cluster) - memory
        await crowd.offer(CALM_LOAD * peak, AFTER_S)
        await asyncio.gather(*crowd.tasks)
    ctx.note(f"clients late by p50 {_ms(percentile(lags, 50))}, p99 {_ms(percentile(lags, 99))}")
    _judge(ctx, crowd, peak, calm_s, spike_s, over_s, grown)


def _judge(ctx: Context, crowd: Crowd, peak: float, calm_s: float, spike_s: float, over_s: float, grown: int) -> None:
    goodput = crowd.tokens(spike_s, over_s) / (over_s - spike_s) / peak
    refused = [a for a in crowd.asked if a.status == 429 and a.first_s is not None]
    rejects = [a.at_s + (a.first_s or 0.0) - a.sent_s for a in refused]
    at_99, at_50 = percentile(rejects, 99), percentile(rejects, 50)
    hung = sum(a.hung for a in crowd.asked)
    other = [a for a in crowd.asked if a.status not in (200, 429) and not a.hung]
    bare = sum(a.status == 429 and not a.retry_after for a in crowd.asked)
    normal = percentile(crowd.first_s(calm_s + 5, spike_s), 50) or 0.0
    back = _normal_again(crowd, over_s, max(2 * normal, normal + 0.5))
    in_spike = percentile(crowd.first_s(spike_s + 30, over_s), 50)
    ctx.note(f"peak {peak:.1f} tokens/s, goodput {goodput:.0%}; memory +{grown >> 20} MiB")
    ctx.note(f"{len(rejects)} refused, p50 {_ms(at_50)}, p99 {_ms(at_99)}")
    for line in by_refuser(refused, spike_s):
        ctx.note(line)
    ctx.note(f"first token p50 {_ms(normal)} before, {_ms(in_spike)} in the spike")
    ctx.require(goodput >= LEAST_GOODPUT, f"goodput {goodput:.0%} of peak")
    ctx.require(at_99 is not None and at_99 <= REJECT_LIMIT_S, f"refusals take {_ms(at_99)} (p99)")
    ctx.require(hung == 0, f"{hung} hung")
    ctx.require(not other, f"{len(other)} answers of other kinds ({sorted({a.status for a in other})})")
    ctx.require(bare == 0, f"{bare} refusals without Retry-After")
    ctx.require(grown <= GROWTH_LIMIT_BYTES, f"memory grew by {grown >> 20} MiB")
    ctx.count(failed=hung + len(other), recover_s=back, requests=len(crowd.asked))  # type: ignore[arg-type]


def by_refuser(refused: list[Asked], spike_s: float) -> list[str]:
    """For each place that refuses: how many it refused, how long that took as the client saw it, and in the proxy."""
    lines = []
    for who in sorted({one.refuser.split(" ")[0] for one in refused}):
        own = [one for one in refused if one.refuser.split(" ")[0] == who]
        took = [one.at_s + (one.first_s or 0.0) - one.sent_s for one in own]
        inside = [float(one.refuser.partition(" ")[2] or 0) / 1000 for one in own]
        num_early = sum(one.at_s < spike_s + EARLY_S for one in own)
        early = f" ({num_early} before the spike was {EARLY_S:g} s old)" if num_early else ""
        times = ", ".join(f"p{at} {_ms(percentile(took, at))}" for at in (50, 90, 99, 100))
        within = f"in the proxy p50 {_ms(percentile(inside, 50))}, p99 {_ms(percentile(inside, 99))}"
        lines.append(f"by {who or 'nobody knows whom'}: {len(own)}{early}, {times} ({within})")
    return lines


def _normal_again(crowd: Crowd, over_s: float, limit_s: float) -> float | None:
    """Seconds after the spike from which on first tokens come as before: the median of each two seconds."""
    worst_s: float | None = 0.0
    for start in range(0, int(AFTER_S) - 4, 2):
        found = percentile(crowd.first_s(over_s + start, over_s + start + 2), 50)
        if found is not None and found > limit_s:
            worst_s = start + 2.0
    return worst_s if worst_s is not None and worst_s < AFTER_S - 6 else None


def _memory(cluster: Cluster) -> int:
    served = getattr(cluster, "served", None)
    return 0 if served is None else sum(one.memory_info().rss for one in served.processes())


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.0f} ms"
