"""F8i: what stands between clients and coordinators dies: an ingress replica, Serve's HTTP proxy.

Their connections are cut, whatever is done behind them: clients go on with `Last-Event-ID`. So this row reads with
such clients, not with the suite's own.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import httpx2 as httpx

from tests.chaos import faults
from tests.chaos.asks import Key, body
from tests.chaos.clusters import Served, ServedChaos
from tests.chaos.context import Context, Golden
from tests.chaos.figures import Bar
from tests.chaos.row import row
from tests.support.resuming_client import Told, stream_all

INGRESS = "ray::ServeReplica"
PROXY = "ray::ProxyActor"
NUM_TOKENS = 240
FLOWING_TIMEOUT_S = 60.0
BACK_TIMEOUT_S = 90.0
PROBE_TIMEOUT_S = 10.0
POLL_S = 0.1


@row(
    "F8I",
    fault="SIGKILL an ingress replica, then Serve's HTTP proxy",
    promise="new requests served by the rest; cut streams resume with the same tokens",
    bar=Bar(text="0 wrong"),
    needs=Served(("--coordinators", "2", "--ingresses", "2")),
    repeats=4,
)
async def the_ingress_dies(ctx: Context) -> None:
    """In turn. With two replicas no new request fails; the only proxy must first be replaced."""
    cluster = ctx.cluster
    assert isinstance(cluster, ServedChaos)
    load = replace(ctx.load, max_tokens=NUM_TOKENS, per_lane=1, arrivals=1, arrival_every_s=0.0)
    golden = await ctx.golden(load)
    keys = [key for key in sorted(load.keys()) if key[0] == "lane"]
    bodies = [body(load, key, cluster.model_id) for key in keys]
    for number in ctx.trials():
        title = (INGRESS, PROXY)[number % 2]
        await cluster.wait_whole()
        victims = await asyncio.to_thread(until_there, cluster, title, 2 if title == INGRESS else 1)
        probe = Probe(cluster.url, {**bodies[0], "stream": False, "max_tokens": 1})
        answers = [Told() for _ in bodies]
        pid = victims[ctx.rng.randrange(len(victims))]
        began_s = await asyncio.to_thread(play, cluster.url, bodies, answers, probe, pid)
        whole = await asyncio.to_thread(until_there, cluster, title, len(victims))
        count(ctx, golden, keys, answers, began_s, time.monotonic() - began_s)
        cut = sum(bool(one.cuts_s) for one in answers)
        served_s = [at_s for at_s, status in probe.found if status == 200]
        first_s = min(served_s, default=began_s + BACK_TIMEOUT_S) - began_s
        ctx.note(f"{title}: {cut} of {len(answers)} streams cut, a new request served after {first_s:.1f} s")
        ctx.require(pid not in whole, f"{title} was not replaced")
        refused = [status for _, status in probe.found if status != 200]
        ctx.require(title == PROXY or not refused, f"{title}: new requests had {refused[:5]}")


@dataclass(slots=True)
class Probe:
    """New requests, one after the other: when each was answered, and with which status (0: not at all)."""

    url: str
    body: dict[str, object]
    found: list[tuple[float, int]] = field(default_factory=list)

    def ask(self) -> None:
        """One request."""
        try:
            reply = httpx.post(f"{self.url}/v1/completions", json=self.body, timeout=PROBE_TIMEOUT_S)
            self.found.append((time.monotonic(), reply.status_code))
        except httpx.HTTPError:
            self.found.append((time.monotonic(), 0))


def play(url: str, bodies: Sequence[dict[str, object]], answers: Sequence[Told], probe: Probe, pid: int) -> float:
    """Streams everything, kills `pid` once all have tokens, and asks anew until nothing streams. When it was killed."""
    with stream_all(url, bodies, answers):
        deadline_s = time.monotonic() + FLOWING_TIMEOUT_S
        while not all(one.token_ids for one in answers) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        began_s = time.monotonic()
        faults.kill(pid)
        while not all(one.finish_reason or one.failed for one in answers):
            probe.ask()
            time.sleep(POLL_S)
    return began_s


def until_there(cluster: ServedChaos, title: str, num: int) -> list[int]:
    """Process ids with that title, once there are so many; what there is after BACK_TIMEOUT_S."""
    deadline_s = time.monotonic() + BACK_TIMEOUT_S
    while True:
        pids = [one.pid for one in cluster.processes(title)]
        if len(pids) == num or time.monotonic() > deadline_s:
            return pids
        time.sleep(POLL_S)


def count(
    ctx: Context, golden: Golden, keys: Sequence[Key], answers: Sequence[Told], began_s: float, recover_s: float
) -> None:
    """The trial's figures; a gap counts from golden run."""
    wrong = 0
    for key, told in zip(keys, answers, strict=True):
        expected = golden.answers[key].tokens
        wrong += sum(mine != theirs for mine, theirs in zip(told.token_ids, expected, strict=False))
        wrong += abs(len(told.token_ids) - len(expected)) if told.failed is None else 0
    gap_s = max(one.worst_gap_s for one in answers)
    failures = [one.failed[:60] for one in answers if one.failed is not None]
    ctx.count(  # type: ignore[arg-type]
        failed=len(failures),
        wrong_tokens=wrong,
        gap_ms=gap_s * 1e3,
        stall_ms=max(0.0, gap_s - golden.gap_s) * 1e3,
        recover_s=recover_s,
        requests=len(answers),
        tokens=sum(len(one.token_ids) for one in answers),
        errors={name: failures.count(name) for name in failures},
    )
