"""The hot loop of a coordinator: schedule, forward through the experts, sample, tell.

It composes the model's mathematics with the scheduler's decisions and owns neither; who hears the outputs is
the sink's business (`actors.coordinator.service`). Everything runs on one event loop: torch inline, the
experts awaited. A trouble of one request ends that request; a trouble of a step ends the sequences of that
step; the loop lives on.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from actors.coordinator.batch_builder import StepInput, build_step
from actors.coordinator.engine_counters import EngineCounters
from actors.coordinator.engine_io import EXPIRED, STOPPED, UNEXPLAINED, Failure, GenerationOutput, GenerationRequest
from actors.coordinator.forward_driver import ForwardDriver
from actors.coordinator.live_sequences import LiveSequences
from actors.coordinator.step_sampling import RowResult, sample_step
from actors.dispatch.remote_experts import ExpertUnavailable
from cluster.ids import SequenceId
from cluster.scheduler import ScheduledBatch, Scheduler, SequenceUpdate
from protos.expert_pb2 import STATUS_DEADLINE_EXCEEDED

LOG = logging.getLogger(__name__)

Sink = Callable[[Sequence[GenerationOutput]], None]


class Engine:
    """One coordinator's sequences, from `submit` to their last output.

    `sink` is called on the event loop with all outputs of a step at once, and at once for what ends between
    two steps; it must neither block nor raise. Call everything from the event loop on which `run` runs.
    """

    def __init__(
        self,
        *,
        driver: ForwardDriver,
        scheduler: Scheduler,
        eos_token_ids: Iterable[int],
        sink: Sink,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.counters = EngineCounters()
        self.live = LiveSequences(frozenset(eos_token_ids))
        self.load = driver.load
        self.now = clock
        self._driver = driver
        self._sink = sink
        self._open_step: ScheduledBatch | None = None
        self._computing: asyncio.Task[list[GenerationOutput]] | None = None

    def submit(self, request: GenerationRequest) -> SequenceId:
        """Queues a request. Raises QueueFull, RequestTooLong or SequenceError; then nothing is kept."""
        live = self.live.prepare(request)
        self.scheduler.add(live.sequence)
        self.live.keep(live, self.now(), self._expire)
        return live.sequence.seq_id

    def cancel(self, seq_id: SequenceId) -> bool:
        """Ends a sequence at once and tells the sink; False where it has already ended."""
        live = self.live.get(seq_id)
        if live is None or not self.scheduler.cancel(seq_id):
            return False
        self._tell([self.live.last_output(live.sequence)])
        self._drop_pointless_step()
        return True

    def fail_all(self, failure: Failure) -> None:
        """Ends every sequence with `failure`."""
        self._tell([self._fail(sequence.seq_id, failure) for sequence in self.live.sequences])
        self._drop_pointless_step()

    async def run(self) -> None:
        """Steps while there is work, sleeps while there is none; ends by cancellation, failing what lives.

        Raises AssertionError when the scheduler's books do not add up: then nothing here can be trusted.
        """
        try:
            while True:
                if not self.live:
                    self.scheduler.check_integrity()
                    await self.live.wait_for_some()
                await self.step()
                await asyncio.sleep(0)  # submits, cancels and health checks get in, whatever the experts do
        finally:
            self.fail_all(STOPPED)

    async def step(self) -> None:
        """Computes one step for whom the scheduler chooses, and tells the sink what came of it."""
        began_s = time.perf_counter()
        batch = self.scheduler.schedule(self.now())
        self.load.roll(self.now())
        self._open_step = batch
        self._tell([self.live.last_output(sequence, EXPIRED) for sequence in batch.expired])
        if not batch.items:
            self._abandon()
            return
        try:
            outputs = await self._compute_alone(batch)
        except ExpertUnavailable as error:
            LOG.warning("step %d: %s", batch.step, error)
            outputs = self._fail_step(batch, Failure(STATUS_DEADLINE_EXCEEDED, str(error)))
        except Exception:  # the top of the loop: one step must not end all others
            LOG.exception("step %d failed", batch.step)
            outputs = self._fail_step(batch, UNEXPLAINED)
        self._tell(outputs)
        self.counters.count_step(time.perf_counter() - began_s, self._driver.expert_wait_s)

    async def _compute_alone(self, batch: ScheduledBatch) -> list[GenerationOutput]:
        """Computes as a task of its own, which is cancelled when all its sequences have ended meanwhile."""
        self._computing = asyncio.ensure_future(self._compute(batch))
        try:
            return await self._computing
        except asyncio.CancelledError:
            self._abandon()
            own = asyncio.current_task()
            if own is not None and own.cancelling():
                raise
            self.counters.dropped_steps += 1
            return []
        finally:
            self._computing = None

    async def _compute(self, batch: ScheduledBatch) -> list[GenerationOutput]:
        step = build_step(batch)
        logits_RV = await self._driver.forward(step.forward)
        began_s = time.perf_counter()
        outputs = self._conclude(batch, step, logits_RV)
        self.counters.sampling_s += time.perf_counter() - began_s
        return outputs

    def _conclude(self, batch: ScheduledBatch, step: StepInput, logits_RV: Tensor) -> list[GenerationOutput]:
        """Samples, advances the sequences, and says what each got. Who has ended meanwhile gets nothing."""
        rows = [one for one in step.rows if not one.item.sequence.is_finished]
        results = sample_step(logits_RV, rows, self.live.choices())
        failed = {seq_id: one for seq_id, one in results.items() if isinstance(one, Failure)}
        good = {seq_id: one for seq_id, one in results.items() if isinstance(one, RowResult)}
        outputs = [self._fail(seq_id, failure) for seq_id, failure in failed.items()]
        tokens = {seq_id: [place.token for place in one.sampled] for seq_id, one in good.items()}
        updates = {update.sequence.seq_id: update for update in self.scheduler.postprocess(batch, tokens)}
        self._open_step = None
        outputs += [self._output(seq_id, result, updates.pop(seq_id, None)) for seq_id, result in good.items()]
        outputs += [self.live.last_output(one.sequence) for one in updates.values() if one.finish_reason]
        return outputs

    def _output(self, seq_id: SequenceId, result: RowResult, update: SequenceUpdate | None) -> GenerationOutput:
        live = self.live.get(seq_id)
        assert live is not None, f"sequence {seq_id} ended while its step was concluded"
        tokens = () if update is None else update.tokens
        for token in tokens:
            live.choice.state.observe(token)
        finish_reason = None if update is None else update.finish_reason
        if finish_reason is not None:
            self.live.forget(seq_id)
        return GenerationOutput(
            seq_id=seq_id,
            num_prompt_tokens=live.sequence.num_prompt,
            token_ids=tokens,
            logprobs=tuple(one.logprob for one in result.sampled if one.logprob is not None),
            prompt_logprobs=result.prompt_logprobs,
            finish_reason=finish_reason,
        )

    def _fail_step(self, batch: ScheduledBatch, failure: Failure) -> list[GenerationOutput]:
        self.counters.failed_steps += 1
        alive = [item.sequence.seq_id for item in batch.items if self.live.get(item.sequence.seq_id)]
        outputs = [self._fail(seq_id, failure) for seq_id in alive]
        self._abandon()
        self.scheduler.check_integrity()
        return outputs

    def _fail(self, seq_id: SequenceId, failure: Failure) -> GenerationOutput:
        live = self.live.get(seq_id)
        assert live is not None, f"sequence {seq_id} cannot fail: it has ended"
        self.scheduler.fail(seq_id)
        self.counters.failed_sequences += 1
        return self.live.last_output(live.sequence, failure)

    def _expire(self) -> None:
        """Ends what is overdue, even while a step waits for its experts."""
        self._tell([self.live.last_output(one, EXPIRED) for one in self.scheduler.expire(self.now())])
        self._drop_pointless_step()

    def _abandon(self) -> None:
        """Closes the step in flight without a result, unless it has got one."""
        if self._open_step is not None:
            batch, self._open_step = self._open_step, None
            self.scheduler.abandon(batch)

    def _drop_pointless_step(self) -> None:
        batch = self._open_step
        if batch is None or self._computing is None:
            return
        if all(item.sequence.is_finished for item in batch.items):
            self._computing.cancel()

    def _tell(self, outputs: Sequence[GenerationOutput]) -> None:
        if outputs:
            self._sink(outputs)
