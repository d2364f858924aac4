"""When each way is asked, and what comes of it: latency of one request at idle, and throughput of many streams."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median, quantiles

from experiments.front_bench.ways import ENGINE, Way, Wish
from protos.coordinator_pb2 import SnapshotReply

PAUSE_S = 0.05
"""Between two requests of which each is alone: what it finds is an idle server, not a warm one."""

Snapshot = Callable[[], Awaitable[SnapshotReply]]
_salts = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """One request alone: seconds to its first token, and of the engine's steps for it; `roundtrip_s` beside it."""

    way: str
    ttft_s: float
    steps_s: float
    roundtrip_s: float | None

    @property
    def overhead_s(self) -> float:
        """All that is not the engine's step."""
        return self.ttft_s - self.steps_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Many streams at once: tokens of all answers a second."""

    way: str
    round: int
    tokens_per_s: float
    ttft_s: float

    def to_json(self) -> dict[str, object]:
        """The line of stdout."""
        return {"type": "throughput", **asdict(self)}


async def latencies(ways: Sequence[Way], wishes: Sequence[Wish], snapshot: Snapshot) -> list[Latency]:
    """Each wish by every way, one request at a time; who begins takes turns. Raises what asking raises."""
    done: list[Latency] = []
    for number, wish in enumerate(wishes):
        for way in (*ways[number % len(ways) :], *ways[: number % len(ways)]):
            await asyncio.sleep(PAUSE_S)
            roundtrip_s = await way.roundtrip()
            before = await snapshot()
            await asyncio.sleep(PAUSE_S)
            told = await way.ask(_salted(wish))
            await asyncio.sleep(PAUSE_S)  # a step is counted after its tokens were told
            steps_s = (await snapshot()).step_s_total - before.step_s_total
            done.append(Latency(way=way.name, ttft_s=told.first_s, steps_s=steps_s, roundtrip_s=roundtrip_s))
    return done


async def throughput(way: Way, wishes: Sequence[Wish], round_number: int) -> Throughput:
    """All wishes at once. Raises what asking raises; then nothing goes on."""
    began_s = time.perf_counter()
    tasks = [asyncio.ensure_future(way.ask(_salted(wish))) for wish in wishes]
    try:
        told = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    took_s = time.perf_counter() - began_s
    return Throughput(
        way=way.name,
        round=round_number,
        tokens_per_s=sum(wish.output_len for wish in wishes) / took_s,
        ttft_s=median(one.first_s for one in told),
    )


def _salted(wish: Wish) -> Wish:
    return replace(wish, salt=f"{wish.salt}-{next(_salts)}")


def latency_summary(done: Sequence[Latency]) -> list[dict[str, object]]:
    """A line for each way, milliseconds; `over_engine_ms` is what its overhead is above the engine's own way."""
    own = median(one.overhead_s for one in done if one.way == ENGINE)
    lines: list[dict[str, object]] = []
    for way in dict.fromkeys(one.way for one in done):
        mine = [one for one in done if one.way == way]
        overheads = sorted(one.overhead_s for one in mine)
        trips = [one.roundtrip_s for one in mine if one.roundtrip_s is not None]
        lines.append(
            {
                "type": "ttft",
                "way": way,
                "requests": len(mine),
                "ttft_ms": 1e3 * median(one.ttft_s for one in mine),
                "steps_ms": 1e3 * median(one.steps_s for one in mine),
                "overhead_ms": 1e3 * median(overheads),
                "p90_overhead_ms": 1e3 * quantiles(overheads, n=10)[-1] if len(overheads) > 1 else None,
                "over_engine_ms": 1e3 * (median(overheads) - own),
                "roundtrip_ms": 1e3 * median(trips) if trips else None,
            }
        )
    return lines


def throughput_summary(done: Sequence[Throughput]) -> list[dict[str, object]]:
    """A line for each way: medians over rounds, and their ratio to the engine's own."""
    medians = {
        way: median(one.tokens_per_s for one in done if one.way == way)
        for way in dict.fromkeys(one.way for one in done)
    }
    return [
        {"type": "throughput_summary", "way": way, "tokens_per_s": value, "of_engine": value / medians[ENGINE]}
        for way, value in medians.items()
    ]
