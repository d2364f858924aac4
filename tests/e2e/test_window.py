"""A real cluster in a real browser: an expert is killed, the page says so while it lasts, and when it is back."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest

from tests.support.chromium import Page, chromium, needs_chromium
from tests.support.served_cluster import ServedCluster, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROW = "[...document.querySelectorAll('#replicas tbody tr')].find(r => r.textContent.includes('expert-3-r0'))"


async def say(cluster: ServedCluster, num_tokens: int) -> None:
    body = {"model": "tiny", "prompt": "The door of the house", "max_tokens": num_tokens, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=120) as client:
        reply = await client.post(f"{cluster.url}/v1/completions", json=body)
        assert reply.status_code == 200, reply.text


@contextlib.asynccontextmanager
async def again_and_again(work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Meanwhile: what is waited for lasts until it is seen, however late a page is drawn."""

    async def loop() -> None:
        while True:
            await work()
            await asyncio.sleep(0.5)

    working = asyncio.create_task(loop())
    try:
        yield
    finally:
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working


async def kill_if_ready(cluster: ServedCluster) -> None:
    """The process of expert 3, whichever it is now."""
    status = await asyncio.to_thread(cluster.status)
    (one,) = (one for one in status.replicas if one.replica_id == "expert-3-r0")
    if one.state == "ready":
        with contextlib.suppress(ProcessLookupError):  # the supervisor has not missed it yet
            os.kill(one.pid, signal.SIGKILL)


@needs_chromium
def test_a_killed_expert_is_seen_on_the_page(cluster: ServedCluster, tmp_path: Path) -> None:
    pid = next(one.pid for one in cluster.status().replicas if one.replica_id == "expert-3-r0")

    async def work(page: Page) -> None:
        await page.size(1440, 1000)
        await page.open(f"{cluster.url}/dashboard")
        await page.until("document.querySelectorAll('#heat td.load').length === 4 * 8", 120)
        await page.until(f"{ROW}?.dataset.state === 'ready'", 120)
        async with again_and_again(lambda: say(cluster, 48)):
            await page.until("parseFloat(document.querySelector('#value-generated').textContent) > 0", 120)
            await page.until("document.querySelector('#load-summary').textContent.includes('Hottest: expert')", 120)
            await page.until("document.querySelector('#value-itl').textContent.includes('s')", 120)
        assert psutil.pid_exists(pid)
        async with again_and_again(lambda: kill_if_ready(cluster)):
            await page.until(
                f"{ROW}.dataset.state !== 'ready' && document.querySelector('#state').textContent.includes('degraded')",
                120,
            )
        await page.screenshot(tmp_path / "killed.png", whole=True)
        await page.until(f"{ROW}.dataset.state === 'ready'", 240)
        await page.until("document.querySelector('#state').textContent.includes('ready')", 240)
        assert page.problems == []

    async def watched() -> None:
        async with asyncio.timeout(800), chromium(tmp_path) as page:
            await work(page)

    asyncio.run(watched())
    now = next(one for one in cluster.status().replicas if one.replica_id == "expert-3-r0")
    assert now.pid != pid


def test_top_shows_the_same_by_supervisor_and_by_http(cluster: ServedCluster) -> None:
    asyncio.run(say(cluster, 8))
    for options in ([], ["--url", cluster.url]):
        shown = top(cluster, *options)
        rows = rows_of_experts(shown)
        assert [int(line[:6]) for line in rows] == list(range(8)), shown
        assert all("1/1" in line for line in rows)
        assert "octavo tiny  ready" in shown
        assert "8 ready" in shown


def top(cluster: ServedCluster, *options: str) -> str:
    """What it shows once the front door has everybody's word: for its first looks that may have come too late."""
    deadline_s = time.monotonic() + 200
    while True:
        done = run(["top", "--once", *options], cluster.env)
        assert done.returncode == 0, done.stderr
        complete = " unknown " not in done.stdout and rows_of_experts(done.stdout)
        if complete or time.monotonic() > deadline_s:
            return done.stdout


def rows_of_experts(shown: str) -> list[str]:
    """Lines that begin with an expert's number."""
    return [line for line in shown.splitlines() if line[:6].strip().isdecimal()]


def test_an_open_page_does_not_hold_up_the_end(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end waits for requests for as long as a drain may take, which is longer here than this test."""
    monkeypatch.setenv("OCTAVO_DRAIN_TIMEOUT_S", "3000")
    served = ServedCluster(tmp_path, tiny_model, "--experts-per-actor", "4")
    states: list[str] = []
    seen = asyncio.Event()

    async def watch() -> None:
        async with httpx.AsyncClient(timeout=120) as client:
            while True:
                async with client.stream("GET", f"{served.url}/dashboard/events") as reply:
                    async for line in reply.aiter_lines():
                        if line.startswith("data: "):
                            states.append(json.loads(line.removeprefix("data: "))["cluster"]["state"])
                            if states[-1] == "ready":  # a first look may end before the supervisor has answered
                                seen.set()
                await asyncio.sleep(0.1)

    async def work() -> int:
        watching = asyncio.create_task(watch())
        async with asyncio.timeout(240):
            await seen.wait()
        status = await asyncio.to_thread(served.stop)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
            await watching
        return status

    assert asyncio.run(work()) == 0
    assert "ready" in states
