"""Plays a load against a server over HTTP: lanes that ask one request after the other, and long prompts that just come.

It plays until it is told to stop; then what runs is read to its end. What is asked is `tests.chaos.asks`'.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager

import aiohttp

from tests.chaos.asks import Key, Load, body
from tests.chaos.figures import Answer, Stream, answer_of
from tests.chaos.stream import ask

REQUEST_TIMEOUT_S = 150.0
CONNECT_TIMEOUT_S = 60.0
AFTER_FAILURE_S = 0.25
MAX_FAILURES = 500
MAX_OPEN_ARRIVALS = 16
POLL_S = 0.02


class Player:
    """A load being played. `streams` are all answers so far, those under way included."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model_id: str, load: Load) -> None:
        self.load = load
        self.streams: list[Stream] = []
        self._session = session
        self._url = url
        self._model_id = model_id
        self._stopping = asyncio.Event()
        self._may_ask = asyncio.Event()
        self._may_ask.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._arrivals: set[asyncio.Task[None]] = set()
        self._arrived = 0

    @property
    def lanes(self) -> list[Stream]:
        """Answers of the lanes: those whose tokens come at a steady rate."""
        return [stream for stream in self.streams if stream.key[0] == "lane"]

    def start(self) -> None:
        """Begins to ask."""
        for lane in range(self.load.streams):
            self._go(self._lane(lane))
        if self.load.arrival_every_s > 0:
            self._go(self._arrive())

    def burst(self, count: int) -> None:
        """That many long prompts at once, now."""
        for _ in range(count):
            self._arrival()

    async def until_flowing(self, timeout_s: float = 180.0) -> None:
        """Returns when every lane has had a token, or a request has failed. Raises TimeoutError."""
        await wait_until(self._flows_or_fails, timeout_s, "every lane has a token")

    def _flows_or_fails(self) -> bool:
        if any(stream.error is not None for stream in self.streams):
            return True
        return len({stream.key[1] for stream in self.lanes if stream.tokens}) == self.load.streams

    @asynccontextmanager
    async def only_begun(self) -> AsyncIterator[list[Stream]]:
        """Until the block ends no lane asks anew. Gives the answers under way, of which each has a token."""
        self._may_ask.clear()
        try:
            await wait_until(lambda: all(one.tokens for one in self._open), 180, "every answer has begun")
            yield self._open
        finally:
            self._may_ask.set()

    @property
    def _open(self) -> list[Stream]:
        return [stream for stream in self.lanes if stream.ended_s is None]

    async def finish(self, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        """Asks nothing new and reads what runs to its end; whatever is not over in time has failed."""
        self._stopping.set()
        running = {*self._tasks, *self._arrivals}
        if running:
            _, late = await asyncio.wait(running, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def ask(self, key: Key) -> Stream:
        """One request, answered or failed."""
        stream = Stream(key, time.monotonic())
        self.streams.append(stream)
        asked = body(self.load, key, self._model_id)
        if key[0] == "arrival":  # a prompt that was asked before is to be computed again all the same
            asked["cache_salt"] = str(len(self.streams))
        await ask(self._session, self._url, asked, stream)
        return stream

    async def _lane(self, lane: int) -> None:
        count = failures = 0
        while not self._stopping.is_set() and failures < MAX_FAILURES:
            await self._may_ask.wait()
            stream = await self.ask(self.load.lane(lane, count))
            count += 1
            if stream.error is not None:
                failures += 1
                await self._pause(AFTER_FAILURE_S)

    async def _arrive(self) -> None:
        while not self._stopping.is_set():
            if len(self._arrivals) < MAX_OPEN_ARRIVALS:
                self._arrival()
            await self._pause(self.load.arrival_every_s)

    def _arrival(self) -> None:
        task = asyncio.create_task(self._one(self.load.arrival(self._arrived)))
        self._arrived += 1
        self._arrivals.add(task)
        task.add_done_callback(self._arrivals.discard)

    async def _one(self, key: Key) -> None:
        await self.ask(key)

    async def _pause(self, seconds: float) -> None:
        """Less when it is time to stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    def _go(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@asynccontextmanager
async def playing(url: str, model_id: str, load: Load) -> AsyncIterator[Player]:
    """A player that has not begun yet; nothing of it is left at the end."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        player = Player(session, url, model_id, load)
        try:
            yield player
        finally:
            await player.finish(0)


async def ask_all(url: str, model_id: str, load: Load, keys: Sequence[Key]) -> dict[Key, Answer]:
    """The answers to these requests, as many at once as the load has streams. Raises GoldenFailed."""
    answers: dict[Key, Answer] = {}
    slots = asyncio.Semaphore(load.streams)
    async with playing(url, model_id, load) as player:

        async def one(key: Key) -> None:
            async with slots:
                answers[key] = golden_of(await player.ask(key))

        await asyncio.gather(*(one(key) for key in keys))
    return answers


class GoldenFailed(RuntimeError):
    """A request failed though nothing was done to the cluster: there is nothing to compare with."""


def golden_of(stream: Stream) -> Answer:
    """Raises GoldenFailed."""
    if not stream.whole:
        raise GoldenFailed(f"without any fault, {stream.key} failed: {stream.error or 'not over'}")
    return answer_of(stream)


async def wait_until(holds: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Processes and streams tell nobody when they change: asks again and again. Raises TimeoutError."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        await asyncio.sleep(POLL_S)
