"""A served model under fuzzed HTTP, with eight golden streams running all the time.

Reported: answers by status, 5xx that were not promised, requests that were never answered, processes that were
replaced, memory that each process grew by, and golden streams that said anything else than before.
"""

import asyncio
import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.fuzz import cluster_process
from tests.fuzz.http_client import Client, send_once
from tests.fuzz.http_golden import GOLDEN_TOKENS, GOLDENS, Golden
from tests.fuzz.http_requests import MODEL, Asked, asked, request
from tests.support.checkpoints import write_mixtral
from tests.support.tokenizers import write_byte_tokenizer

SENDERS = 12
WARM_REQUESTS = 400
MAX_GROWTH_BYTES = 50 << 20
MAX_MODEL_LEN = 256
MAX_SHOWN = 8


@dataclass
class HttpReport:
    """What a campaign did. Growth is of the process that grew most, in bytes."""

    requests: int = 0
    seconds: float = 0.0
    undeclared_5xx: int = 0
    unanswered: int = 0
    unexpected_errors: int = 0
    restarts: int = 0
    golden_streams: int = 0
    golden_wrong: int = 0
    golden_refused: int = 0
    rss_growth: int = 0
    grew: dict[str, int] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    shown: list[str] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Whether the bar was met."""
        wrong = (self.undeclared_5xx, self.unanswered, self.unexpected_errors, self.restarts, self.golden_wrong)
        return not any(wrong) and self.golden_streams > 0 and self.rss_growth <= MAX_GROWTH_BYTES

    def show(self, text: str) -> None:
        """Keeps the first few things that went wrong."""
        if len(self.shown) < MAX_SHOWN:
            self.shown.append(text)

    def line(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "statuses": dict(sorted(self.statuses.items())), "held": self.held}


Processes = Callable[[], Mapping[str, psutil.Process]]
"""The victim's processes by what they are."""


async def campaign(
    url: str, processes: Processes, *, requests: int, seed: int, seconds: float = float("inf")
) -> HttpReport:
    """So many requests, or as many as there is time for, after some that warm up."""
    report, warming = HttpReport(), HttpReport()
    host, port = place(url)
    await _send_all(url, requests=min(WARM_REQUESTS, requests), seed=seed + 1, seconds=seconds, report=warming)
    errors = await _unexpected(host, port)
    goldens = [Golden(host, port, index) for index in range(GOLDENS)]
    expected = [await golden.ask() for golden in goldens]
    assert all(len(one) == 3 and len(one[1]) == GOLDEN_TOKENS for one in expected), expected
    before = {name: (one.pid, one.create_time(), one.memory_info().rss) for name, one in processes().items()}
    began = time.monotonic()
    stopping = asyncio.Event()
    streams = [
        asyncio.create_task(golden.keep_asking(said, stopping, report))
        for golden, said in zip(goldens, expected, strict=True)
    ]
    await _send_all(url, requests=requests, seed=seed, seconds=seconds, report=report)
    stopping.set()
    await asyncio.gather(*streams)
    report.seconds = round(time.monotonic() - began, 3)
    for golden in goldens:
        golden.close()
    report.unexpected_errors = await _unexpected(host, port) - errors
    _compare(before, processes(), report)
    return report


def _compare(
    before: Mapping[str, tuple[int, float, int]], now: Mapping[str, psutil.Process], report: HttpReport
) -> None:
    for name, (pid, born, rss) in before.items():
        one = now.get(name)
        if one is None or one.pid != pid or one.create_time() != born:
            report.restarts += 1
            report.show(f"{name} is another process")
            continue
        report.grew[name] = max(0, one.memory_info().rss - rss)
    report.rss_growth = max(report.grew.values(), default=0)


async def _send_all(url: str, *, requests: int, seed: int, seconds: float, report: HttpReport) -> None:
    host, port = place(url)
    numbers = iter(range(requests))
    until = time.monotonic() + seconds

    async def sender() -> None:
        client = Client(host, port)
        for number in numbers:
            if time.monotonic() > until:
                break
            answer = await client.send(asked(seed, number))
            report.requests += 1
            report.statuses[answer.status] += 1
            report.undeclared_5xx += answer.undeclared
            report.unanswered += answer.silent
            if answer.undeclared or answer.silent:
                report.show(f"request {number}: {answer.status} {answer.body[:300]!r}")
        client.close()

    await asyncio.gather(*(sender() for _ in range(SENDERS)))


def place(url: str) -> tuple[str, int]:
    """Host and port."""
    parts = urlsplit(url)
    return str(parts.hostname), int(parts.port or 80)


async def _unexpected(host: str, port: int) -> int:
    """Exceptions that reached the outermost layer, as the front door counts them."""
    answer = await send_once(host, port, Asked(request("GET", "/metrics", b""), True))
    page = answer.body.decode().splitlines()
    assert any(line.startswith("octavo_") for line in page), answer
    return sum(int(float(line.split()[-1])) for line in page if line.startswith("octavo_unexpected_errors_total"))


def write_model(home: Path) -> Path:
    """A tiny checkpoint, served under the name that the requests use."""
    path = home / MODEL
    write_mixtral(path, layers=1, experts=2)
    write_byte_tokenizer(path, 300)
    return path


def run_http(*, requests: int, seconds: float, seed: int) -> int:
    """A campaign against `octavo serve` on Ray; prints a line of JSON. Returns the exit status."""
    from tests.support.served_cluster import ServedCluster

    with tempfile.TemporaryDirectory(prefix="octavo-fuzz-") as home:
        options = ("--device", "cpu", "--kv-cache-gib", "0.05", "--max-model-len", str(MAX_MODEL_LEN))
        cluster = ServedCluster(Path(home), write_model(Path(home)), *options)
        try:
            report = asyncio.run(
                campaign(
                    cluster.url, lambda: _by_name(cluster.processes()), requests=requests, seed=seed, seconds=seconds
                )
            )
        finally:
            cluster.stop()
        print(json.dumps(report.line()), flush=True)
    return 0 if report.held else 1


def run_plain_http(*, requests: int, seconds: float, seed: int) -> int:
    """The same against a cluster in one process, without Ray. Returns the exit status."""

    async def work(home: Path) -> HttpReport:
        model = await asyncio.to_thread(write_model, home)
        process, facts = await cluster_process.spawn(
            home / "cluster.log", model_dir=str(model), max_model_len=MAX_MODEL_LEN
        )
        try:
            victim = {"cluster": psutil.Process(process.pid)}
            return await campaign(facts["url"], lambda: victim, requests=requests, seed=seed, seconds=seconds)
        finally:
            await cluster_process.end(process)

    with tempfile.TemporaryDirectory(prefix="octavo-fuzz-") as home:
        report = asyncio.run(work(Path(home)))
    print(json.dumps(report.line()), flush=True)
    return 0 if report.held else 1


def _by_name(processes: list[psutil.Process]) -> dict[str, psutil.Process]:
    """All but Ray's workers in reserve, which come and go: Ray names its actors' processes by what they are."""
    found: dict[str, psutil.Process] = {}
    for one in sorted(processes, key=lambda process: process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = [*one.cmdline(), "", ""]
            name = words[0].split(".")[0].strip()  # behind a dot is what it does at the moment
            if not name.startswith("ray::"):
                name = " ".join(Path(word).name for word in words[:3] if word and not word.startswith("-")) or "none"
            if "IDLE" not in name:
                found[f"{name} {sum(known.rpartition(' ')[0] == name for known in found)}"] = one
    return found
