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
from experiments.engine_bench.shares import step_shares
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


@dataclass(slots=True)
class _Snapshots:
    """Asks the coordinator when all sequences have begun, and again when the first is done."""

    client: CoordinatorClient
    waiting: int
    asked: list[asyncio.Task[SnapshotReply]] = field(default_factory=list)
    done: bool = False

    def begun(self) -> None:
        self.waiting -= 1
        if self.waiting == 0:
            self._ask()

    def ended(self) -> None:
        if not self.done:
            self.done = True
            self._ask()

    def _ask(self) -> None:
        self.asked.append(asyncio.create_task(self.client.snapshot()))


async def prefill(client: CoordinatorClient, prompts: Prompts, *, parallel: int) -> Sample:
    """One token for each prompt; the shares are of the whole run."""
    before = await client.snapshot()
    run = await _generate_all(client, prompts, 1, None)
    after = await client.snapshot()
    tokens = sum(map(len, prompts))
    return Sample(run, step_shares(before, after, tokens=tokens, parallel=parallel), _load_between(before, after))


async def decode(client: CoordinatorClient, prompts: Prompts, output_len: int, *, parallel: int) -> Sample:
    """`output_len` tokens for each prompt; shares and load are of the time in which all decode, to a step or two."""
    snapshots = _Snapshots(client, len(prompts))
    run = await _generate_all(client, prompts, output_len, snapshots)
    before, after = await asyncio.gather(*snapshots.asked)
    tokens = after.generated_tokens_total - before.generated_tokens_total
    return Sample(run, step_shares(before, after, tokens=tokens, parallel=parallel), _load_between(before, after))


async def _generate_all(
    client: CoordinatorClient, prompts: Prompts, output_len: int, snapshots: _Snapshots | None
) -> Run:
    await client.connect()
    submits = [_submit(index, prompt, output_len) for index, prompt in enumerate(prompts)]
    clock = LoopClock()
    began_s = time.perf_counter()
    tasks = [asyncio.ensure_future(_generate(client, submit, clock, snapshots)) for submit in submits]
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
    client: CoordinatorClient, submit: Submit, clock: LoopClock, snapshots: _Snapshots | None
) -> list[tuple[int, float]]:
    answer: list[tuple[int, float]] = []
    async for output in client.generate(submit):
        now_s = clock.now()
        if output.token_ids and not answer and snapshots is not None:
            snapshots.begun()
        answer += [(token, now_s) for token in output.token_ids]
        if is_last(output):
            if snapshots is not None:
                snapshots.ended()
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
