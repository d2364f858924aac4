"""One looks, however many watch: bounded places, nobody looks for nobody, the slow get the newest, streams end."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from actors.window.broadcast import Broadcast, Frame, TooManyViewers
from tests.support.front import run


class Looker:
    """Gives frame after frame, each when `step` lets it."""

    def __init__(self, *, stepwise: bool = False) -> None:
        self.looks = 0
        self.looking = 0
        self.most_looking = 0
        self.errors: list[Exception] = []
        self.ends = False
        self._steps: asyncio.Semaphore | None = asyncio.Semaphore(0) if stepwise else None

    def step(self) -> None:
        assert self._steps is not None
        self._steps.release()

    async def look(self) -> Frame:
        self.looking += 1
        self.most_looking = max(self.most_looking, self.looking)
        try:
            if self._steps is not None:
                await self._steps.acquire()
            self.looks += 1
            if self.errors:
                raise self.errors.pop()
            return Frame(str(self.looks).encode(), self.ends)
        finally:
            self.looking -= 1


async def first(frames: AsyncGenerator[bytes, None]) -> int:
    return int(await anext(frames))


def test_all_see_the_same_frames_of_one_who_looks() -> None:
    async def work() -> None:
        looker = Looker(stepwise=True)
        shared = Broadcast(looker.look, period_s=0.0)
        views = [shared.frames() for _ in range(3)]
        waiting = [asyncio.ensure_future(first(view)) for view in views]
        looker.step()
        assert [await one for one in waiting] == [1, 1, 1]
        waiting = [asyncio.ensure_future(first(view)) for view in views]
        looker.step()
        assert [await one for one in waiting] == [2, 2, 2]
        assert looker.most_looking == 1
        late = shared.frames()
        assert await first(late) == 2, "who comes later is shown what there is, at once"
        for view in (*views, late):
            await view.aclose()

    run(work())


def test_nobody_looks_when_nobody_watches() -> None:
    async def work() -> None:
        looker = Looker()
        shared = Broadcast(looker.look, period_s=0.0)
        one, other = shared.frames(), shared.frames()
        await anext(one)
        await anext(other)
        await one.aclose()
        before = looker.looks
        await anext(other)
        await anext(other)
        assert looker.looks > before, "somebody watches still"
        await other.aclose()
        before = looker.looks
        for _ in range(20):
            await asyncio.sleep(0)
        assert (looker.looks, looker.looking, shared.num_viewers) == (before, 0, 0)
        again = shared.frames()
        assert await first(again) > before, "what was seen last time is not shown as if it were now"
        await again.aclose()

    run(work())


def test_places_are_bounded_and_given_back() -> None:
    async def work() -> None:
        shared = Broadcast(Looker().look, period_s=0.0, max_viewers=2)
        views = [shared.frames(), shared.frames()]
        for view in views:
            await anext(view)
        with pytest.raises(TooManyViewers):
            await anext(shared.frames())
        assert shared.num_viewers == 2
        await views[0].aclose()
        async with aclosing(shared.frames()) as another:
            await anext(another)
        await views[1].aclose()

    run(work())


def test_who_is_slow_gets_the_newest_and_nothing_piles_up() -> None:
    async def work() -> None:
        looker = Looker(stepwise=True)
        shared = Broadcast(looker.look, period_s=0.0)
        slow, quick = shared.frames(), shared.frames()
        looker.step()
        assert [await first(slow), await first(quick)] == [1, 1]
        for expected in (2, 3, 4):
            looker.step()
            assert await first(quick) == expected
        assert await first(slow) == 4
        await slow.aclose()
        await quick.aclose()

    run(work())


def test_a_look_that_fails_is_logged_and_the_next_one_follows(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        looker = Looker()
        looker.errors = [RuntimeError("on purpose")]
        async with aclosing(Broadcast(looker.look, period_s=0.0).frames()) as frames:
            assert await first(frames) == 2

    run(work())
    assert "the next look follows" in caplog.text


def test_a_stream_ends_after_a_while_and_with_the_last_frame() -> None:
    async def work() -> None:
        shared = Broadcast(Looker().look, period_s=0.0, life_s=0.0)
        assert len([frame async for frame in shared.frames()]) == 1
        looker = Looker()
        looker.ends = True
        assert [frame async for frame in Broadcast(looker.look).frames()] == [b"1"]
        assert looker.looking == 0

    run(work())
