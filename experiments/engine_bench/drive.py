"""Drives one coordinator: submits prompts as token ids, and notes when each token came.

No HTTP, no text, no Ray: whoever has a CoordinatorClient can measure. Starting a cluster is
`experiments.engine_bench.cluster`'s work.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from actors.front.coordinator_client import CoordinatorClient
from experiments.engine_bench.contestants import Prompts, Sample
from experiments.engine_bench.failures import BenchError
from experiments.engine_bench.shares import CpuTimes, Moment, step_shares
from experiments.engine_bench.timing import Run
from protos.coordinator_pb2 import FINISH_REASON_LENGTH, Sampling, SnapshotReply, Submit
from protos.outputs import is_last


class LoopClock:
    """One reading for each turn of the event loop: what one message brings to many readers came at one time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._reading: float | None = None

    def now(self) -> float:
        """Seconds. Call it on an event loop."""
        if self._reading is None:
            self._reading = self._clock()
            asyncio.get_running_loop().call_soon(self._forget)
        return self._reading

    def _forget(self) -> None:
        self._reading = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A coordinator, and what its cluster is like: at most `parallel` experts compute at once."""

    client: CoordinatorClient
    parallel: int = 1
    read_cpu: Callable[[], CpuTimes] = CpuTimes

    async def moment(self) -> Moment:
        """What has been counted up to now."""
        cpu = self.read_cpu()
        return Moment(await self.client.snapshot(), cpu)


@dataclass(slots=True)
class _Window:
    """Notes the moments when all sequences have begun and when the first is done."""

    target: Target
    waiting: int
    moments: list[asyncio.Task[Moment]] = field(default_factory=list)
    done: bool = False

    def begun(self) -> None:
        self.waiting -= 1
        if self.waiting == 0:
            self._note()

    def ended(self) -> None:
        if not self.done:
            self.done = True
            self._note()

    def _note(self) -> None:
        self.moments.append(asyncio.create_task(self.target.moment()))


async def prefill(target: Target, prompts: Prompts) -> Sample:
    """One token for each prompt; the shares are of the whole run. Raises BenchError or CoordinatorLost."""
    began = await target.moment()
    run = await _generate_all(target.client, prompts, 1, None)
    ended = await target.moment()
    return _sample(run, began, ended, sum(map(len, prompts)), target.parallel)


async def decode(target: Target, prompts: Prompts, output_len: int) -> Sample:
    """`output_len` tokens for each prompt; shares and load are of the time in which all decode, to a step or two.

    Raises BenchError or CoordinatorLost.
    """
    window = _Window(target, len(prompts))
    run = await _generate_all(target.client, prompts, output_len, window)
    began, ended = await asyncio.gather(*window.moments)
    tokens = ended.snapshot.generated_tokens_total - began.snapshot.generated_tokens_total
    return _sample(run, began, ended, tokens, target.parallel)


def _sample(run: Run, began: Moment, ended: Moment, tokens: int, parallel: int) -> Sample:
    shares = step_shares(began, ended, tokens=tokens, parallel=parallel)
    return Sample(run, shares, _load_between(began.snapshot, ended.snapshot))


async def _generate_all(client: CoordinatorClient, prompts: Prompts, output_len: int, window: _Window | None) -> Run:
    await client.connect()
    submits = [_submit(index, prompt, output_len) for index, prompt in enumerate(prompts)]
    clock = LoopClock()
    began_s = time.perf_counter()
    tasks = [asyncio.ensure_future(_generate(client, submit, clock, window)) for submit in submits]
    try:
        answers = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return Run(
        tokens=tuple(tuple(token for token, _ in answer) for answer in answers),
        arrivals_s=tuple(tuple(at - began_s for _, at in answer) for answer in answers),
    )


async def _generate(
    client: CoordinatorClient, submit: Submit, clock: LoopClock, window: _Window | None
) -> list[tuple[int, float]]:
    answer: list[tuple[int, float]] = []
    async for output in client.generate(submit):
        now_s = clock.now()
        if output.token_ids and not answer and window is not None:
            window.begun()
        answer += [(token, now_s) for token in output.token_ids]
        if is_last(output):
            if window is not None:
                window.ended()
            if output.finish_reason != FINISH_REASON_LENGTH:
                raise BenchError(f"the cluster ended a sequence early: {output.error or output.finish_reason}")
    return answer


def _submit(request_id: int, prompt: Sequence[int], output_len: int) -> Submit:
    return Submit(
        request_id=request_id,
        prompt_token_ids=prompt,
        max_tokens=output_len,
        ignore_eos=True,
        sampling=Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=1),
    )


def _load_between(before: SnapshotReply, after: SnapshotReply) -> tuple[tuple[int, ...], ...]:
    earlier = [tuple(layer.tokens) for layer in before.load]
    later = [tuple(layer.tokens) for layer in after.load]
    return tuple(
        tuple(now - then for now, then in zip(new, old, strict=True)) for new, old in zip(later, earlier, strict=True)
    )
