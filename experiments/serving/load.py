"""Sends prompts at their times, never more than so many at once, and waits for all. What sending means is given."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from experiments.serving.prompts import Prompt
from experiments.serving.results import RequestResult

Send = Callable[[Prompt], Awaitable[RequestResult]]


@dataclass(frozen=True, slots=True)
class Load:
    """All results in the order of the prompts, seconds from start to the last answer, and the client's CPU seconds."""

    results: tuple[RequestResult, ...]
    duration_s: float
    client_cpu_s: float


async def run_load(send: Send, prompts: Sequence[Prompt], arrivals_s: Sequence[float], concurrency: int) -> Load:
    """Sends `prompts[i]` at `arrivals_s[i]` seconds after now, or later when `concurrency` are in flight.

    `send` gives a result whose `start_s` is on `time.perf_counter`; here it becomes seconds after the run's start.
    """
    slots = asyncio.Semaphore(concurrency)
    cpu_s, origin_s = time.process_time(), time.perf_counter()

    async def one(prompt: Prompt, due_s: float) -> RequestResult:
        async with slots:
            result = await send(prompt)
        start_s = result.start_s - origin_s
        return replace(result, start_s=start_s, queue_s=max(0.0, start_s - due_s))

    tasks: list[asyncio.Task[RequestResult]] = []
    async with asyncio.TaskGroup() as group:
        for prompt, due_s in zip(prompts, arrivals_s, strict=True):
            wait_s = origin_s + due_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.append(group.create_task(one(prompt, due_s)))
    duration_s = time.perf_counter() - origin_s
    return Load(tuple(task.result() for task in tasks), duration_s, time.process_time() - cpu_s)
