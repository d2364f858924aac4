"""The one thread of a process that runs kernels, so that the event loop beside it always answers.

One thread, because every thread that calls into torch gets an OpenMP pool of its own, and two pools on the
same cores ruin both. It also watches doorbells between two jobs, so that rows from a lane are computed where they
arrive, without a hand-over. What a job does and whether it may be dropped is the caller's; the queue's bound is the
caller's too, in tokens (see `actors.expert.desk`).
"""

import asyncio
import contextlib
import heapq
import logging
import os
import select
import threading
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from typing import TypeVar

import torch

LOG = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
Job = Callable[[], None]

LAST = 2**64
"""An urgency behind every deadline: when nothing else is queued."""

_FIRST = -1  # before every deadline


class ComputeThread:
    """Runs jobs by urgency, then in order of arrival. `failures` counts jobs and watchers that raised.

    `on_start` runs in the thread first: it may set how the system schedules it, for good.
    """

    def __init__(self, name: str, num_threads: int, on_start: Callable[[], None] | None = None) -> None:
        if num_threads < 1:
            raise ValueError(f"threads is {num_threads}, expected at least 1")
        self.num_threads = num_threads
        self.failures = 0
        self._on_start = on_start or _yield_to_senders
        self._arrivals = count()
        self._jobs: list[tuple[int, int, Job | None]] = []
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.epoll()
        self._poll.register(self._wake, select.EPOLLIN)
        self._watchers: dict[int, Job] = {}
        self._ended = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread; torch gets `num_threads` threads inside it."""
        self._thread.start()

    def submit(self, job: Job, urgency: int = 0) -> None:
        """Queues `job`; the smallest urgency (say, a deadline) runs first. It reports its own errors.

        In the thread itself or in the one that calls `stop`; after that it is dropped.
        """
        if self._ended:
            return
        self._put(urgency, job)
        if threading.get_ident() != self._thread.ident:
            self._ring()

    def watch(self, fd: int, on_readable: Job) -> None:
        """Calls `on_readable` in the thread whenever `fd` can be read, between two jobs."""
        self._watchers[fd] = on_readable
        self._poll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """Forgets `fd`; call it before closing."""
        if self._watchers.pop(fd, None) is not None and not self._poll.closed:
            self._poll.unregister(fd)

    async def call(self, function: Callable[[], ResultT]) -> ResultT:
        """Runs `function` in the thread before all that waits, and returns or raises what it does.

        Raises RuntimeError after `stop`.
        """
        if self._ended:
            raise RuntimeError("the compute thread has ended")
        result: Future[ResultT] = Future()

        def job() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(function())
            except BaseException as error:  # noqa: BLE001 - it is handed to the waiting caller, whatever it is
                result.set_exception(error)

        self.submit(job, _FIRST)
        return await asyncio.wrap_future(result)

    async def stop(self) -> None:
        """Ends the thread after the job that runs now; what is queued behind it is dropped."""
        if self._ended:
            return
        self._ended = True
        self._put(_FIRST - 1, None)
        self._ring()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self._poll.close()
        os.close(self._wake)

    def _put(self, urgency: int, job: Job | None) -> None:
        with self._lock:
            heapq.heappush(self._jobs, (urgency, next(self._arrivals), job))

    def _ring(self) -> None:
        os.eventfd_write(self._wake, 1)

    def _work(self) -> None:
        self._on_start()  # before the pool of OpenMP threads is made, which inherits it
        torch.set_num_threads(self.num_threads)
        with torch.inference_mode():
            while (job := self._next()) is not None:
                self._guarded(job)
                del job  # a job holds a message's rows: not until the next one comes

    def _next(self) -> Job | None:
        """The most urgent job, once every doorbell has been looked at."""
        while True:
            for fd, _ in self._poll.poll(0 if self._jobs else None):
                self._look_at(fd)
            with self._lock:
                if self._jobs:
                    return heapq.heappop(self._jobs)[2]

    def _look_at(self, fd: int) -> None:
        """A function of its own: a watcher holds its peer's memory, and none may be remembered while this waits."""
        if fd == self._wake:
            os.eventfd_read(fd)
            return
        watcher = self._watchers.get(fd)
        if watcher is not None:
            self._guarded(watcher)

    def _guarded(self, job: Job) -> None:
        try:
            job()
        except Exception:  # one bad job must not end the thread
            self.failures += 1
            LOG.exception("a compute job failed")


def _yield_to_senders() -> None:
    """A batch task does not interrupt whoever wakes it: a coordinator with one core less than experts can then send to
    all of them before the first one takes its place.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
