"""The one thread of a process that runs kernels, so that the event loop beside it always answers.

One thread, because every thread that calls into torch gets an OpenMP pool of its own, and two pools on the
same cores ruin both. What a job does and whether it may be dropped is the caller's; the queue's bound is the
caller's too, in tokens (see `actors.expert.service`).
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from queue import PriorityQueue
from typing import TypeVar

import torch

LOG = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
Job = Callable[[], None]

_FIRST = -1  # before every deadline


class ComputeThread:
    """Runs jobs by urgency, then in order of arrival. `failures` counts jobs that raised."""

    def __init__(self, name: str, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"threads is {num_threads}, expected at least 1")
        self.num_threads = num_threads
        self.failures = 0
        self._arrivals = count()
        self._jobs: PriorityQueue[tuple[int, int, Job | None]] = PriorityQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread; torch gets `num_threads` threads inside it."""
        self._thread.start()

    def submit(self, job: Job, urgency: int = 0) -> None:
        """Queues `job`; the smallest urgency (say, a deadline) runs first. It reports its own errors."""
        self._jobs.put((urgency, next(self._arrivals), job))

    async def call(self, function: Callable[[], ResultT]) -> ResultT:
        """Runs `function` in the thread before all that waits, and returns or raises what it does."""
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
        self._jobs.put((_FIRST - 1, next(self._arrivals), None))
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        torch.set_num_threads(self.num_threads)
        while (job := self._jobs.get()[2]) is not None:
            try:
                job()
            except Exception:  # one bad job must not end the thread
                self.failures += 1
                LOG.exception("a compute job failed")
            del job  # a job holds a message's rows: not until the next one comes
