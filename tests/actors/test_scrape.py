"""A page of metrics asks seldom, waits little, and shows what was seen last."""

import asyncio

from actors.front.scrape import FORGET_S, Scrape, StatusWatch
from actors.supervision.status import ClusterStatus
from tests.support.front import run
from tests.support.statuses import status


class Supervisor:
    """Says how it is while `gate` is set, and fails while `error` is."""

    def __init__(self, max_wait_s: float = 30.0) -> None:
        self.asked = 0
        self.asking = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.now_s = 100.0
        self.watch = StatusWatch(self.look, clock=lambda: self.now_s)
        self.scrape = Scrape(self.watch.refresh, max_wait_s=max_wait_s)

    async def look(self) -> ClusterStatus | None:
        self.asked += 1
        self.asking.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return status(map_epoch=self.asked)


def test_nobody_is_asked_more_than_once_a_second() -> None:
    async def work() -> None:
        one = Supervisor()
        for _ in range(5):
            await one.scrape.refresh()
        assert one.asked == 1
        one.now_s += 1.0
        await one.scrape.refresh()
        assert one.watch.last is not None
        assert one.watch.last.map_epoch == one.asked == 2

    run(work())


def test_a_page_does_not_wait_for_the_silent_nor_ask_them_twice() -> None:
    async def work() -> None:
        one = Supervisor(max_wait_s=0.01)
        while one.watch.last is None:
            await one.scrape.refresh()
        one.gate.clear()
        for _ in range(5):
            one.now_s += 1.0
            await one.scrape.refresh()
        assert one.asked == 2, "one question is under way, however many pages are read"
        assert one.watch.last is not None
        assert one.watch.last.map_epoch == 1
        one.gate.set()
        while one.watch.last.map_epoch == 1:
            await one.scrape.refresh()
        assert one.asked == 2
        await one.scrape.close()

    run(work())


def test_who_fails_is_shown_as_last_seen_but_not_for_ever() -> None:
    async def work() -> None:
        one = Supervisor()
        await one.scrape.refresh()
        one.error = TimeoutError("away")
        one.now_s += 1.0
        await one.scrape.refresh()
        assert one.asked == 2
        assert one.watch.last is not None
        one.now_s += FORGET_S
        assert one.watch.last is None

    run(work())


def test_closing_gives_up_a_look() -> None:
    async def work() -> None:
        one = Supervisor()
        one.gate.clear()
        looking = asyncio.create_task(one.scrape.refresh())
        await one.asking.wait()
        await one.scrape.close()
        await looking

    run(work())
