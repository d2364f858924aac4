"""The phases of a scenario on a cluster that runs, and what comes of them in the form of a simulation's result.

Requests go to the coordinator as token ids of real text, faults are signals to expert processes. So one report shows
both worlds. A host is an expert process here.
"""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

import numpy as np

from actors.front.coordinator_client import CoordinatorClient, CoordinatorLost
from actors.supervision.status import ClusterStatus
from cluster.load import balancedness
from cluster.simulate import SimulationResult, Timeline
from experiments.scenario.load import PhaseLoad
from experiments.scenario.schema import Scenario
from experiments.scenario.signals import strike
from experiments.scenario.texts import TextSource
from protos.coordinator_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, Sampling, SnapshotReply, Submit
from protos.outputs import is_last

END_TIMEOUT_S = 120.0
"""After the last phase, for what is still being answered."""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One request: when it was sent, its first and its last token, in seconds of the run; tokens it got."""

    sent_s: float
    first_s: float
    last_s: float
    prompt_tokens: int
    output_tokens: int


class Supervising(Protocol):
    """What is asked of a supervisor here; see `actors.supervision.client.SupervisorClient`."""

    def status(self) -> ClusterStatus: ...

    def replicate(self, expert: int, first: int | None, last: int | None, node: str | None) -> dict[str, Any]: ...

    def drain_replica(self, replica_id: str) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class LiveCluster:
    """A running cluster: a client of its coordinator, prompts for it, and who supervises it."""

    client: CoordinatorClient
    texts: TextSource
    supervisor: Supervising

    async def status(self) -> ClusterStatus:
        """Every replica and coordinator, as of now."""
        return await asyncio.to_thread(self.supervisor.status)

    async def copy(self, expert: int) -> str:
        """Begins one more replica of the expert and returns its id. Raises MoveRefused."""
        made = await asyncio.to_thread(self.supervisor.replicate, expert, None, None, None)
        return str(made["replica_id"])

    async def drain(self, replica_id: str) -> None:
        """Begins to end that replica. Raises MoveRefused."""
        await asyncio.to_thread(self.supervisor.drain_replica, replica_id)

    async def run(self, scenario: Scenario, loads: list[PhaseLoad]) -> SimulationResult:
        """The phases, once."""
        return await LiveRun(self).run(scenario, loads)


class LiveRun:
    """The phases on one coordinator, with a sampler and the faults beside them."""

    def __init__(self, cluster: LiveCluster) -> None:
        self._client, self._texts, self._status = cluster.client, cluster.texts, cluster.status
        self._answers: list[Answer] = []
        self._num_failed = self._num_sent = self._num_counted = 0
        self._origin_s = 0.0
        self._line = Timeline()
        self._process_seconds = self._counted_s = 0.0
        self.snapshots: list[tuple[float, SnapshotReply]] = []
        """The coordinator's counters at the beginning and at the end of each window, and when that was."""

    async def run(self, scenario: Scenario, loads: list[PhaseLoad]) -> SimulationResult:
        """Sends everything; raises what a lost cluster raises, not what a single request does."""
        self._origin_s = time.monotonic()
        async with AsyncExitStack() as beside:
            await beside.enter_async_context(_beside(self._sample(scenario.hosts.window_s)))
            for fault in scenario.faults:
                await beside.enter_async_context(_beside(strike(fault, self._status, self._origin_s)))
            tasks: set[asyncio.Task[None]] = set()
            for load in loads:
                await self._send(load, tasks)
            if tasks:
                await asyncio.wait(tasks, timeout=END_TIMEOUT_S)
            for task in tasks:
                task.cancel()
        return self._result()

    @asynccontextmanager
    async def sending(self, load: PhaseLoad) -> AsyncIterator[None]:
        """Sends that phase's requests beside the block, and ends at the block's end what is still unanswered."""
        self._origin_s = time.monotonic() - load.begin_s
        tasks: set[asyncio.Task[None]] = set()
        try:
            async with _beside(self._send(load, tasks)):
                yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _now_s(self) -> float:
        return time.monotonic() - self._origin_s

    async def _send(self, load: PhaseLoad, tasks: set[asyncio.Task[None]]) -> None:
        """Adds a task for each client or request, until the phase has ended."""
        await (self._closed(load, tasks) if load.phase.concurrency else self._open(load, tasks))

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(at_s - self._now_s(), 0.0))

    async def _open(self, load: PhaseLoad, tasks: set[asyncio.Task[None]]) -> None:
        for index, at_s in enumerate(load.arrival_s):
            await self._until(load.begin_s + float(at_s))
            tasks.add(asyncio.create_task(self._one(load, index)))
        await self._until(load.begin_s + load.phase.duration_s)

    async def _closed(self, load: PhaseLoad, tasks: set[asyncio.Task[None]]) -> None:
        order = iter(range(len(load.arrival_s)))
        end_s = load.begin_s + load.phase.duration_s

        async def client() -> None:
            while self._now_s() < end_s and (index := next(order, None)) is not None:
                await self._one(load, index)

        assert load.phase.concurrency is not None, "checked by the caller"
        tasks.update(asyncio.create_task(client()) for _ in range(load.phase.concurrency))
        await self._until(end_s)

    async def _one(self, load: PhaseLoad, index: int) -> None:
        """Sends one request and notes its answer; one that fails is counted."""
        prompt = self._texts.prompt(load.phase.text, int(load.prompt_tokens[index]))
        wanted = self._texts.room_for(len(prompt), int(load.output_tokens[index]))
        self._num_sent += 1
        sent_s, first_s, count, ended = self._now_s(), 0.0, 0, False
        try:
            async for output in self._client.generate(_submit(self._num_sent, prompt, wanted)):
                if output.token_ids:
                    first_s = first_s or self._now_s()
                    count += len(output.token_ids)
                if is_last(output):
                    ended = output.finish_reason in (FINISH_REASON_LENGTH, FINISH_REASON_STOP)
        except CoordinatorLost:
            ended = False
        if ended and count:
            self._answers.append(Answer(sent_s, first_s, self._now_s(), len(prompt), count))
        else:
            self._num_failed += 1

    async def _sample(self, window_s: float) -> None:
        before, began_s = await self._client.snapshot(), self._now_s()
        self.snapshots.append((began_s, before))
        while True:
            await self._until(began_s + window_s)
            now, at_s = await self._client.snapshot(), self._now_s()
            self.snapshots.append((at_s, now))
            self._write_down(before, now, began_s, at_s, await self._status())
            before, began_s = now, at_s

    def _write_down(
        self, before: SnapshotReply, now: SnapshotReply, began_s: float, at_s: float, status: ClusterStatus
    ) -> None:
        serving = [one for one in status.replicas if one.state == "ready"]
        line, ready = self._line, len(serving)
        load_LE = np.array([one.tokens for one in now.load]) - np.array([one.tokens for one in before.load])
        balanced_L = balancedness(load_LE)
        line.at_s.append(at_s)
        line.hosts.append(ready)
        line.copies.append(sum(len(one.expert_ids) for one in serving))
        line.balancedness.append(float(balanced_L.mean()))
        line.worst_balancedness.append(float(balanced_L.min()))
        line.critical_share.append((now.expert_wait_s_total - before.expert_wait_s_total) / (at_s - began_s))
        line.queue_s.append(float(getattr(now, "queue_s", 0.0)))
        line.moved_bytes.append(int(getattr(getattr(status, "balance", None), "moved_bytes_total", 0)))
        tokens = now.prompt_tokens_total + now.generated_tokens_total
        tokens -= before.prompt_tokens_total + before.generated_tokens_total
        line.tokens.append(max(int(tokens) - self._count_ended(), 0))
        self._process_seconds += ready * (at_s - self._counted_s)
        self._counted_s = at_s

    def _count_ended(self) -> int:
        """Answers that ended since this was last asked: the last token of each does not go through the model."""
        num, self._num_counted = len(self._answers) - self._num_counted, len(self._answers)
        return num

    def _result(self) -> SimulationResult:
        answers, line = self._answers, self._line
        sent, first, last = (np.array([getattr(a, n) for a in answers]) for n in ("sent_s", "first_s", "last_s"))
        outputs = np.array([a.output_tokens for a in answers])
        several = outputs > 1
        duration_s = max([a.last_s for a in answers], default=self._now_s())
        rest = (line.hosts[-1] if line.hosts else 0) * max(duration_s - self._counted_s, 0.0)
        return SimulationResult(
            duration_s=duration_s,
            num_steps=0,
            num_tokens=sum(a.prompt_tokens + a.output_tokens - 1 for a in answers),
            num_unfinished=self._num_failed,
            ttft_s=first - sent,
            tpot_s=(last - first)[several] / (outputs[several] - 1),
            e2el_s=last - sent,
            host_seconds=self._process_seconds + rest,
            moved_bytes=line.moved_bytes[-1] if line.moved_bytes else 0,
            num_copies=0,
            timeline=line,
            log=(),
        )


@asynccontextmanager
async def _beside(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Runs it in the background and ends it at the block's end; if it failed meanwhile, that is raised there."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        (error,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(error, Exception):
        raise error


def _submit(request_id: int, prompt: list[int], num_tokens: int) -> Submit:
    return Submit(
        request_id=request_id,
        prompt_token_ids=prompt,
        max_tokens=num_tokens,
        ignore_eos=True,
        sampling=Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=1),
    )
