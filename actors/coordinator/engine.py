"""The hot loop of a coordinator: schedule, forward through the experts, sample, tell.

It composes the model's mathematics with the scheduler's decisions and owns neither; who hears the outputs is
the sink's business (`actors.coordinator.service`). Everything runs on one event loop: torch inline, the
experts awaited. A trouble of one request ends that request and no other, found out by `recovery` where a whole step
raised; an expert that is away is waited for, by each sequence until its own deadline; the loop lives on.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from actors.coordinator.batch_builder import StepInput, build_step
from actors.coordinator.engine_counters import EngineCounters
from actors.coordinator.engine_io import (
    DISPLACED,
    EXPIRED,
    STOPPED,
    UNEXPLAINED,
    Failure,
    GenerationOutput,
    GenerationRequest,
)
from actors.coordinator.forward_driver import ForwardDriver
from actors.coordinator.live_sequences import LiveSequences
from actors.coordinator.recovery import Recovery
from actors.coordinator.routing_log import RoutingLog
from actors.coordinator.sequence_traces import SequenceTraces
from actors.coordinator.step_sampling import RowResult, sample_step
from actors.coordinator.trace_tap import TraceTap
from actors.dispatch.remote_experts import ExpertUnavailable, RowsRejected
from cluster.ids import SequenceId
from cluster.scheduler import ScheduledBatch, Scheduler, SequenceUpdate
from cluster.sequence import FinishReason
from model.routing import RoutingCapture

LOG = logging.getLogger(__name__)

WAIT_PAUSE_S = 0.1
"""Before a step is tried again that no expert was there for; the round has waited for them already."""

Sink = Callable[[Sequence[GenerationOutput]], None]


class Engine:
    """One coordinator's sequences, from `submit` to their last output.

    `sink` is called on the event loop with all outputs of a step at once, and at once for what ends between
    two steps; it must not block, and where it raises it must not have taken the outputs: they are then given to it
    one by one. Call everything from the event loop on which `run` runs.

    `alarms` rises when answers that experts gave before may have been wrong, or would be others now: then what they
    left in the KV cache is for nobody else.

    `waiting_for` says which expert the sequences wait for after a round gave up; empty while all goes well.
    """

    def __init__(
        self,
        *,
        driver: ForwardDriver,
        scheduler: Scheduler,
        eos_token_ids: Iterable[int],
        sink: Sink,
        clock: Callable[[], float] = time.monotonic,
        alarms: Callable[[], int] = lambda: 0,
        traces: SequenceTraces | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.counters = EngineCounters()
        self.live = LiveSequences(frozenset(eos_token_ids))
        self.load = driver.load
        self.now = clock
        self.waiting_for = ""
        shape = driver.backbone.config
        self.routing = RoutingLog(self.live, TraceTap((shape.num_layers, shape.num_experts, shape.top_k)))
        self._traces = SequenceTraces() if traces is None else traces
        self._driver = driver
        self._sink = sink
        self._alarms = alarms
        self._alarms_heeded = alarms()
        self._recovery = Recovery(scheduler, self.live)
        self._step_began_s: float | None = None
        self._open_step: ScheduledBatch | None = None
        self._computing: asyncio.Task[None] | None = None

    def submit(self, request: GenerationRequest) -> SequenceId:
        """Queues a request, in a full queue in another tenant's place.

        Raises QueueFull, RequestTooLong or SequenceError; then nothing is kept.
        """
        live = self.live.prepare(request)
        seq_id = live.sequence.seq_id
        try:
            displaced = self.scheduler.add(live.sequence)
            self.live.keep(live, self.now(), self._expire)
        except BaseException:
            self.scheduler.cancel(seq_id)
            self.live.forget(seq_id)
            raise
        self.routing.arrived(live)
        self.counters.displaced += len(displaced)
        self._tell([self.live.last_output(one, DISPLACED) for one in displaced])
        self._traces.arrived(live.sequence, request.traceparent)
        return seq_id

    @property
    def step_age_s(self) -> float:
        """For how long the step under way has been; 0 between two."""
        return 0.0 if self._step_began_s is None else time.perf_counter() - self._step_began_s

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
                try:
                    await self.step()
                except Exception:  # the top of the loop: what a step did not contain itself
                    LOG.exception("a step could not be planned or counted")
                    self._tell(self._recover(None))
                await self._pause()
        finally:
            self.fail_all(STOPPED)

    async def step(self) -> None:
        """Computes one step for whom the scheduler chooses, and tells the sink what came of it."""
        self._step_began_s = began_s = time.perf_counter()
        try:
            batch = self._plan()
            if not batch.items:
                self._recovery.skip()
                self._abandon()
                return
            await self._attempt(batch)
            self.counters.count_step(time.perf_counter() - began_s, self._driver.expert_wait_s)
        finally:
            self._step_began_s = None

    def _plan(self) -> ScheduledBatch:
        self._heed_alarms()
        batch = self._open_step = self.scheduler.schedule(self.now(), self._recovery.group())
        self.load.roll(self.now())
        self._tell([self.live.last_output(sequence, self._expired()) for sequence in batch.expired])
        return batch

    async def _attempt(self, batch: ScheduledBatch) -> None:
        """The step, or what can be done instead."""
        try:
            if await self._compute_alone(batch):
                self._note_wait("")
        except RowsRejected as error:
            LOG.warning("step %d: %s", batch.step, error)
            self._tell(self._recover(batch))
        except ExpertUnavailable as error:
            self.counters.waiting_steps += 1
            deadline_s = self._deadline_s(batch)
            self._abandon()
            if deadline_s is None or asyncio.get_running_loop().time() < deadline_s:
                self._note_wait(str(error))
        except Exception:  # a step must not end its sequences: one of them may be guilty, or none
            LOG.exception("step %d of %d sequences failed", batch.step, len(batch.items))
            self._tell(self._recover(batch))

    def _recover(self, batch: ScheduledBatch | None) -> list[GenerationOutput]:
        """Keeps everybody but who is known to be guilty. Raises AssertionError when the books are beyond repair."""
        self.counters.failed_steps += 1
        self._open_step = None
        guilty = self._recovery.settle(batch)
        if guilty is None:
            return []
        LOG.error("sequence %d fails: its steps raise when it is alone, too", guilty.seq_id)
        return [self._fail(guilty.seq_id, UNEXPLAINED)]

    def _note_wait(self, waiting_for: str) -> None:
        """Says once that experts are away, and once that they are back."""
        if waiting_for and not self.waiting_for:
            LOG.warning("%d sequences wait: %s", len(self.live), waiting_for)
        elif self.waiting_for and not waiting_for:
            LOG.warning("no longer waiting: %s", self.waiting_for)
        self.waiting_for = waiting_for

    async def _pause(self) -> None:
        """Submits, cancels and health checks get in, whatever the experts do; longer where these are away."""
        await asyncio.sleep(0)
        if self.waiting_for:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAIT_PAUSE_S):
                    await self.live.wait_for_none()

    async def _compute_alone(self, batch: ScheduledBatch) -> bool:
        """Computes as a task of its own, which is cancelled, for False, when all its sequences have ended meanwhile."""
        self._computing = asyncio.ensure_future(self._compute(batch))
        try:
            await self._computing
            return True
        except asyncio.CancelledError:
            self._abandon()
            own = asyncio.current_task()
            if own is not None and own.cancelling():
                raise
            self.counters.dropped_steps += 1
            return False
        finally:
            self._computing = None

    async def _compute(self, batch: ScheduledBatch) -> None:
        step = build_step(batch)
        captures = self.routing.begin()
        self._traces.begin()
        logits_RV = await self._driver.forward(step.forward, self._deadline_s(batch), captures)
        self._traces.computed(batch)
        began_s = time.perf_counter()
        outputs = self._conclude(batch, step, logits_RV, captures)
        self._open_step = None
        self._tell(outputs)
        self.counters.sampling_s += time.perf_counter() - began_s

    def _deadline_s(self, batch: ScheduledBatch) -> float | None:
        """When nobody wants the step any more, on the event loop's clock."""
        latest_s = 0.0
        for item in batch.items:
            if item.sequence.deadline_s is None:
                return None
            latest_s = max(latest_s, item.sequence.deadline_s)
        return asyncio.get_running_loop().time() + latest_s - self.now()

    def _conclude(
        self, batch: ScheduledBatch, step: StepInput, logits_RV: Tensor, captures: list[RoutingCapture] | None
    ) -> list[GenerationOutput]:
        """Samples, advances the sequences, and says what each got. Who has ended meanwhile gets nothing."""
        rows = [one for one in step.rows if not one.item.sequence.is_finished]
        results = sample_step(logits_RV, rows, self.live.choices())
        failed = {seq_id: one for seq_id, one in results.items() if isinstance(one, Failure)}
        good = {seq_id: one for seq_id, one in results.items() if isinstance(one, RowResult)}
        outputs = [self._fail(seq_id, failure) for seq_id, failure in failed.items()]
        tokens = {seq_id: [place.token for place in one.sampled] for seq_id, one in good.items()}
        self._heed_alarms()
        updates = {update.sequence.seq_id: update for update in self.scheduler.postprocess(batch, tokens)}
        if captures is not None:
            self.routing.computed(batch, captures)
        outputs += [self._output(seq_id, result, updates.pop(seq_id, None)) for seq_id, result in good.items()]
        outputs += [self.live.last_output(one.sequence) for one in updates.values() if one.finish_reason]
        return outputs

    def _heed_alarms(self) -> None:
        """Before what a step computed is published, and before the next one reads what others did."""
        alarms = self._alarms()
        if alarms != self._alarms_heeded:
            self._alarms_heeded = alarms
            LOG.warning("%d cached KV blocks are forgotten: experts may have erred", self.scheduler.blocks.num_cached)
            self.scheduler.forget_prefixes()

    def _output(self, seq_id: SequenceId, result: RowResult, update: SequenceUpdate | None) -> GenerationOutput:
        live = self.live.get(seq_id)
        assert live is not None, f"sequence {seq_id} ended while its step was concluded"
        tokens = () if update is None else update.tokens
        for token in tokens:
            live.choice.observe(token)
        return GenerationOutput(
            seq_id=seq_id,
            num_prompt_tokens=live.sequence.num_prompt,
            num_cached_tokens=live.sequence.num_cached_prompt,
            token_ids=tokens,
            logprobs=tuple(one.logprob for one in result.sampled if one.logprob is not None),
            prompt_logprobs=result.prompt_logprobs,
            routed_experts=() if update is None else live.take_routed(),
            finish_reason=None if update is None else update.finish_reason,
        )

    def _fail(self, seq_id: SequenceId, failure: Failure) -> GenerationOutput:
        live = self.live.get(seq_id)
        assert live is not None, f"sequence {seq_id} cannot fail: it has ended"
        self.scheduler.fail(seq_id)
        self.counters.failed_sequences += 1
        return self.live.last_output(live.sequence, failure)

    def _expire(self) -> None:
        """Ends what is overdue, even while a step waits for its experts."""
        self._tell([self.live.last_output(one, self._expired()) for one in self.scheduler.expire(self.now())])
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

    def _expired(self) -> Failure:
        return replace(EXPIRED, text=f"{EXPIRED.text}: {self.waiting_for}") if self.waiting_for else EXPIRED

    def _tell(self, outputs: Sequence[GenerationOutput]) -> None:
        if not outputs:
            return
        self.routing.ended(outputs)
        self._traces.told(outputs)
        self.live.note_told(outputs)
        try:
            self._sink(outputs)
        except Exception:
            LOG.exception("%d outputs could not be told at once", len(outputs))
            for output in outputs:
                self._tell_alone(output)

    def _tell_alone(self, output: GenerationOutput) -> None:
        """An output that cannot be told is the end of its request."""
        try:
            self._sink([output])
        except Exception:
            LOG.exception("an output of sequence %d could not be told: it fails", output.seq_id)
            live = self.live.get(output.seq_id)
            if live is not None:
                self.scheduler.fail(output.seq_id)
                self.live.forget(output.seq_id)
            self.counters.failed_sequences += 1
            last = GenerationOutput(
                seq_id=output.seq_id,
                num_prompt_tokens=output.num_prompt_tokens,
                finish_reason=FinishReason.ERROR,
                failure=UNEXPLAINED,
            )
            self._traces.told([last])
            try:
                self._sink([last])
            except Exception:
                LOG.exception("sequence %d could not be told its end", output.seq_id)
