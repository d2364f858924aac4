"""Continuous batching: which sequences the next step computes, and what its result makes of them.

One Scheduler serves one coordinator and is used from one thread. The engine calls `schedule`, computes the
batch, and calls `postprocess` (or `abandon`); while it waits for the experts it may call everything else. A
sequence that is cancelled meanwhile is gone at once, but its KV blocks are lent to nobody until the step is
over. Clocks are arguments; tensors, sampling and text are the engine's.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

from cluster.block_allocator import BlockAllocator, blocks_for
from cluster.ids import SequenceId
from cluster.queue_pace import PlannedStep, QueuePace
from cluster.sequence import FinishReason, Sequence, SequenceStatus
from cluster.step_plan import (
    ScheduledBatch,
    ScheduledSequence,
    SchedulerConfig,
    SequenceUpdate,
    StepPlanner,
)
from cluster.waiting_queue import QueueFull, WaitingQueue

__all__ = [
    "QueueFull",
    "RequestTooLong",
    "ScheduledBatch",
    "ScheduledSequence",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerCounters",
    "SequenceUpdate",
]


class RequestTooLong(ValueError):
    """A prompt that could never be served here. Names the limit."""


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since start. A prompt token counts when it is first computed, whatever is recomputed later.

    `draft_tokens` were guessed and computed; `accepted_draft_tokens` of them each saved a step. `prefix_queries` are
    the tokens of sequences that were admitted for the first time and might read others' KV blocks, `prefix_hits` those
    of them that were found there and not computed.
    """

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0

    def count(self, item: ScheduledSequence, num_sampled: int) -> None:
        """Count a computed item that gave `num_sampled` tokens, before its sequence advances."""
        sequence = item.sequence
        fresh_from = min(max(item.start, sequence.peak_computed), item.known_stop)
        self.recomputed_tokens += fresh_from - item.start
        self.prompt_tokens += max(0, min(item.known_stop, sequence.num_prompt) - fresh_from)
        self.generated_tokens += num_sampled
        self.draft_tokens += item.num_draft
        self.accepted_draft_tokens += max(0, num_sampled - 1)

    def count_admitted(self, sequence: Sequence) -> None:
        """Count what the KV cache had of a sequence; again and again admitted, it counts once."""
        if sequence.num_preemptions == 0 and sequence.num_reusable:
            self.prefix_queries += sequence.num_tokens
            self.prefix_hits += sequence.num_cached


class Scheduler:
    """Sequences of one coordinator over `num_blocks` KV blocks; tenants take turns to begin."""

    def __init__(self, config: SchedulerConfig, num_blocks: int) -> None:
        self.config = config
        self.counters = SchedulerCounters()
        self.blocks = BlockAllocator(num_blocks)
        self.max_model_len = min(config.max_model_len, num_blocks * config.block_size)
        """Tokens of the longest sequence: the model's limit, or what the whole KV cache can hold."""
        self._waiting = WaitingQueue(
            config.max_waiting_requests,
            config.max_waiting_tokens,
            QueuePace(config.max_num_seqs, config.max_num_batched_tokens),
            config.max_queue_wait_s,
        )
        self._running: list[Sequence] = []
        self._live: dict[SequenceId, Sequence] = {}
        self._in_step: ScheduledBatch | None = None
        self._num_arrivals = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold KV blocks and are not finished."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens that the waiting sequences have yet to compute."""
        return self._waiting.num_tokens

    @property
    def num_waiting_tenants(self) -> int:
        """Tenants among those in the queue that were never admitted."""
        return self._waiting.num_tenants

    def add(self, sequence: Sequence) -> tuple[Sequence, ...]:
        """Queue a new sequence. Returns those that were dropped for it, of a tenant that had more in the queue.

        Raises RequestTooLong when it could never be served, QueueFull when it may be later, ValueError when
        its id is in use.
        """
        _check_fits(sequence, self.max_model_len, self.config.max_waiting_tokens)
        if sequence.seq_id in self._live:
            raise ValueError(f"seq_id {sequence.seq_id} is already in use")
        sequence.arrival = self._num_arrivals
        displaced = self._waiting.push(sequence)
        self._num_arrivals += 1
        self._live[sequence.seq_id] = sequence
        for one in displaced:
            del self._live[one.seq_id]
            self._finish(one, FinishReason.ERROR)
        return displaced

    def room(self, tenant: str, num_tokens: int, most: int) -> tuple[int, float]:
        """How many sequences of a tenant, of so many tokens each, would be queued now: see `WaitingQueue.room`."""
        prompt = range(max(1, min(num_tokens, self.max_model_len - 1)))
        return self._waiting.room(Sequence(seq_id=SequenceId(-1), prompt_ids=prompt, max_tokens=1, tenant=tenant), most)

    def cancel(self, seq_id: SequenceId) -> bool:
        """Drop a sequence at once, wherever it is; False where it has already ended."""
        return self._end(seq_id, FinishReason.CANCELLED)

    def fail(self, seq_id: SequenceId) -> bool:
        """Drop a sequence that cannot go on; False where it has already ended. Its KV blocks are not trusted."""
        sequence = self._live.get(seq_id)
        if sequence is not None:
            self.blocks.forget(sequence.block_table)
        return self._end(seq_id, FinishReason.ERROR)

    def expire(self, now_s: float) -> tuple[Sequence, ...]:
        """Drop and list the sequences whose deadline has come, by arrival. `schedule` does so too."""
        late = [s for s in self._live.values() if s.deadline_s is not None and s.deadline_s <= now_s]
        for sequence in late:
            self._end(sequence.seq_id, FinishReason.EXPIRED)
        return tuple(late)

    def schedule(self, now_s: float, only: frozenset[SequenceId] | None = None) -> ScheduledBatch:
        """Plan the next step, of `only` some if need be; it stays in flight until `postprocess` or `abandon`.

        It may have no items. `now_s` is any clock that does not run backwards, the same as that of the deadlines.
        """
        assert self._in_step is None, f"step {self.counters.steps} is still in flight"
        expired = self.expire(now_s)
        self._waiting.observe(now_s)
        planner = StepPlanner(self.config, self.max_model_len, self._running, self._waiting, self.blocks, only)
        planner.plan()
        self.counters.preemptions += len(planner.preempted)
        if self.config.prefix_caching:
            for sequence in planner.admitted:
                self.counters.count_admitted(sequence)
        batch = self._in_step = ScheduledBatch(
            step=self.counters.steps,
            items=tuple(planner.items),
            expired=expired,
            preempted=tuple(planner.preempted),
        )
        self._waiting.note_plan(self._planned(batch))
        return batch

    def _planned(self, batch: ScheduledBatch) -> PlannedStep:
        uncomputed = sum(sequence.num_uncomputed for sequence in self._running)
        known = sum(item.num_tokens - item.num_draft for item in batch.items)
        return PlannedStep(
            num_tokens=batch.num_tokens,
            num_running=len(self._running),
            num_starting=sum(not sequence.output_ids for sequence in self._running),
            num_waiting=len(self._waiting),
            backlog=max(0, uncomputed - known - (len(self._running) - len(batch.items))),
        )

    def postprocess(self, batch: ScheduledBatch, tokens: Mapping[SequenceId, Items[int]]) -> list[SequenceUpdate]:
        """Apply a computed step. `tokens` has at least one for every item that `needs_token` and is not finished.

        Of a share with guesses it has those that came true, in order, and then the one that was sampled instead
        of the next. Returns an update for each sequence that got a token or ended by itself, in the batch's
        order. Tokens of sequences that were dropped meanwhile are ignored.
        """
        alive = [item for item in batch.items if not item.sequence.is_finished]
        lacking = [i.sequence.seq_id for i in alive if i.needs_token and not tokens.get(i.sequence.seq_id)]
        assert not lacking, f"step {batch.step} has no token for sequences {lacking}"
        self._close(batch)
        self.counters.steps += 1
        updates = []
        for item in alive:
            sequence = item.sequence
            sampled = tuple(tokens[sequence.seq_id]) if item.needs_token else ()
            self.counters.count(item, len(sampled))
            self._waiting.note_output(sequence, len(sampled))
            sequence.advance(item.known_stop)
            if sequence.num_uncomputed:
                self._publish(sequence)
                continue
            reason = self._receive(item, sampled)
            self._take_back(item)
            self._publish(sequence)
            updates.append(SequenceUpdate(sequence=sequence, tokens=sampled, finish_reason=reason))
            if reason is not None:
                self._end(sequence.seq_id, reason)
        return updates

    def abandon(self, batch: ScheduledBatch) -> None:
        """Give up a step without a result: its sequences stand where they stood, and are scheduled again."""
        self._close(batch)
        for item in batch.items:
            if not item.sequence.is_finished:
                self._take_back(item)

    def forget_prefixes(self) -> None:
        """Let nobody read any more what others have computed up to now, because it may be wrong."""
        self.blocks.forget_all()

    def start_over(self, sequences: Iterable[Sequence]) -> None:
        """Rebuild the books from `sequences` alone, whatever they say of themselves: all wait, and hold nothing.

        For when a step died while the books were written. What they say cannot be trusted then; the tokens of a
        sequence can, and all else is computed again from them.
        """
        self._in_step = None
        self.blocks = BlockAllocator(self.blocks.num_blocks)
        self._running.clear()
        self._live.clear()
        self._waiting.clear()
        in_order = sorted(sequences, key=lambda one: one.arrival)
        for sequence in in_order:
            sequence.start_over()
            self._live[sequence.seq_id] = sequence
        self._waiting.restore(in_order)

    def check_integrity(self) -> None:
        """Audit blocks, tables, keys, queue and order. Raises AssertionError saying what is wrong."""
        dropped = [] if self._in_step is None else [i.sequence for i in self._in_step.dropped]
        self.blocks.check_integrity(s.block_table for s in (*self._running, *dropped))
        everyone = [*self._running, *self._waiting]
        turns = [sequence.turn for sequence in (*self._running, *self._waiting.preempted) if sequence.turn >= 0]
        assert turns == sorted(set(turns)), f"not in order of admission: {turns}"
        assert len({sequence.arrival for sequence in everyone}) == len(everyone), "somebody is in two places"
        assert set(self._live.values()) == set(everyone), "a live sequence is in no list"
        assert self.num_running <= self.config.max_num_seqs, self.num_running
        waiting_tokens = sum(sequence.num_tokens for sequence in self._waiting)
        assert self.num_waiting_tokens == waiting_tokens, (self.num_waiting_tokens, waiting_tokens)
        for sequence in self._running:
            _check_running(sequence, len(sequence.block_table) * self.config.block_size, self.max_model_len)
            if self._in_step is None:
                needed = blocks_for(sequence.num_tokens, self.config.block_size)
                assert len(sequence.block_table) <= needed, f"{sequence} holds blocks for more than {needed}"
            self._check_shared(sequence)
        for sequence in self._waiting:
            assert sequence.status is SequenceStatus.WAITING, sequence
            assert not sequence.block_table, sequence
            assert sequence.num_computed == 0, sequence

    def _check_shared(self, sequence: Sequence) -> None:
        """Who can find a block, or holds it too, must be sure that it is whole, and never written again."""
        size, published = self.config.block_size, sequence.num_published
        assert published * size <= sequence.num_computed, f"{sequence} has published what is not computed"
        for index, block in enumerate(sequence.block_table):
            key = self.blocks.key(block)
            assert index < published or (key is None and self.blocks.holders(block) == 1), (
                f"block {block} of {sequence} can be found, or is shared, but may be written"
            )
            if key is not None:
                assert key == sequence.block_key(index, size), f"block {block} of {sequence} has a strange key"

    def _end(self, seq_id: SequenceId, reason: FinishReason) -> bool:
        """Take a live sequence out. Blocks that the step in flight still uses are freed when it is over."""
        sequence = self._live.pop(seq_id, None)
        if sequence is None:
            return False
        if sequence.status is SequenceStatus.WAITING:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._waiting.note_end(sequence)
        self._finish(sequence, reason)
        return True

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        if self._in_step is None or not self._in_step.computes(sequence):
            self._release(sequence)

    def _receive(self, item: ScheduledSequence, sampled: tuple[int, ...]) -> FinishReason | None:
        """Append what was sampled; the guesses among it are in the KV cache already."""
        sequence, num_true = item.sequence, max(0, len(sampled) - 1)
        assert sampled[:num_true] == item.draft_ids[:num_true], (sampled, item.draft_ids)
        reason = None
        for token in sampled or (None,):
            assert reason is None, f"a guess ended the sequence: {sampled} of {item}"
            reason = sequence.receive(token, self.max_model_len)
        if num_true:
            sequence.advance(item.known_stop + num_true)
        return reason

    def _take_back(self, item: ScheduledSequence) -> None:
        """Free the blocks that a computed or abandoned share held for its guesses alone."""
        if item.num_draft:
            table = item.sequence.block_table
            kept = blocks_for(max(item.known_stop, item.sequence.num_computed), self.config.block_size)
            self.blocks.free(reversed(table[kept:]))
            del table[kept:]

    def _publish(self, sequence: Sequence) -> None:
        """Let others share the blocks that became whole: computed from the first position to the last, and certain."""
        size = self.config.block_size
        if sequence.num_computed < (sequence.num_published + 1) * size or not self.config.prefix_caching:
            return
        if sequence.era == self.blocks.era:
            table = sequence.block_table
            for index in range(sequence.num_published, sequence.num_computed // size):
                table[index] = self.blocks.publish(table[index], sequence.block_key(index, size))
            sequence.num_published = sequence.num_computed // size

    def _close(self, batch: ScheduledBatch) -> None:
        """End the step in flight and free the blocks of those that were dropped in it."""
        assert batch is self._in_step, f"step {batch.step} is not the one in flight"
        for item in batch.dropped:
            self._release(item.sequence)
        self._in_step = None

    def _release(self, sequence: Sequence) -> None:
        self.blocks.free(reversed(sequence.block_table))
        sequence.block_table.clear()
        sequence.lookup = None


def _check_fits(sequence: Sequence, max_model_len: int, max_waiting_tokens: int) -> None:
    if sequence.num_prompt + min(1, sequence.max_tokens) > max_model_len:
        output = " and wants output" if sequence.max_tokens else ""
        raise RequestTooLong(
            f"the prompt has {sequence.num_prompt} tokens{output}, but max_model_len is {max_model_len}"
        )
    if sequence.num_prompt > max_waiting_tokens:
        raise RequestTooLong(
            f"the prompt has {sequence.num_prompt} tokens, but max_waiting_tokens is {max_waiting_tokens}"
        )


def _check_running(sequence: Sequence, held: int, max_model_len: int) -> None:
    assert sequence.status is SequenceStatus.RUNNING, sequence
    assert sequence.num_computed < sequence.num_tokens <= max_model_len, sequence
    assert sequence.num_computed <= held, sequence
