"""What one step computes: the plan that the scheduler hands to the engine, and how it is drawn up.

Order of service: running decodes, running prefills, both in order of admission, then admissions in the waiting
queue's order. A sequence gets the blocks of all its known tokens when it is admitted, so only decodes ever grow; who
finds no block makes the latest admitted start over (preemption by recompute, as in vLLM, arXiv 2309.06180 §4.5). That
is never one that is already in the plan, and the earliest always gets what it needs, so every step advances someone.
A step may be kept to a few (`only`); then the others keep what they have and wait. Guesses at what decodes
will say come last of all: they get the tokens and blocks that nobody else wants in this step, and borrow the blocks
for this step only.

Who is admitted shares the blocks that are in the KV cache already, whole ones that somebody has published, and begins
behind them.
"""

from dataclasses import dataclass, field, replace
from itertools import takewhile

from cluster.block_allocator import BlockAllocator, blocks_for
from cluster.ids import SequenceId
from cluster.prompt_lookup import PromptLookup, PromptLookupConfig
from cluster.sequence import FinishReason, Sequence, SequenceStatus
from cluster.waiting_queue import WaitingQueue


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one coordinator's scheduler; all at least 1.

    `max_num_batched_tokens` bounds the tokens of one step, `block_size` is tokens per KV block,
    `max_model_len` the tokens of one sequence, prompt and output together. `max_queue_wait_s` bounds the time that
    a newcomer is likely to wait before it starts; None leaves it to the bounds of the queue. Without
    `prompt_lookup` nothing is guessed, without `prefix_caching` every sequence is computed from its first token.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    max_waiting_requests: int
    max_waiting_tokens: int
    max_model_len: int
    max_queue_wait_s: float | None = None
    prompt_lookup: PromptLookupConfig | None = None
    prefix_caching: bool = False

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        if self.max_queue_wait_s is not None and self.max_queue_wait_s <= 0:
            raise ValueError(f"max_queue_wait_s is {self.max_queue_wait_s}, but must be more than 0")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, "
                f"but must be at least max_num_seqs ({self.max_num_seqs})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledSequence:
    """A sequence's share of one step: tokens at positions start..stop of `sequence`.

    `block_table` covers `stop` positions and is a copy. `needs_token` is True where the share reaches the
    last known token, so that a next one is to be sampled from that row's logits. The last `num_draft` tokens
    are guesses: the row before each says whether it is true, and none of them would end the sequence.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    needs_token: bool
    num_draft: int = 0

    @property
    def stop(self) -> int:
        """Positions in the KV cache once the step is done; the share's context length."""
        return self.start + self.num_tokens

    @property
    def known_stop(self) -> int:
        """`stop` without the guesses."""
        return self.stop - self.num_draft

    @property
    def draft_ids(self) -> tuple[int, ...]:
        """The guesses."""
        return self.token_ids[self.num_tokens - self.num_draft :]

    @property
    def prompt_rows(self) -> range:
        """Rows of this share (0..num_tokens) whose logits score the next prompt token.

        Empty unless the sequence `wants_prompt_logprobs`. Row r scores prompt position start + r + 1. Every
        position from 1 to the prompt's end is scored once, in order, whatever is preempted.
        """
        if not self.sequence.wants_prompt_logprobs:
            return range(0)
        first = max(self.start, self.sequence.peak_computed)
        last = min(self.stop, self.sequence.num_prompt - 1)
        return range(first - self.start, max(first, last) - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledBatch:
    """One step. `expired` sequences have just been removed; `preempted` ones wait again with their output."""

    step: int
    items: tuple[ScheduledSequence, ...]
    expired: tuple[Sequence, ...] = ()
    preempted: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return sum(item.num_tokens for item in self.items)

    @property
    def dropped(self) -> list[ScheduledSequence]:
        """Items whose sequence has ended, by cancellation or otherwise, since the step was planned."""
        return [item for item in self.items if item.sequence.is_finished]

    def computes(self, sequence: Sequence) -> bool:
        """True where the step reads and writes KV blocks of `sequence`."""
        return any(item.sequence is sequence for item in self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceUpdate:
    """What a step gave one sequence: a token, its end, or both; several tokens where guesses came true."""

    sequence: Sequence
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None


@dataclass(slots=True)
class StepPlanner:
    """Draws up one step. Changes `running` (in order of admission), `waiting` and `blocks` as it decides.

    With `only`, nobody else is computed, and nothing is guessed.
    """

    config: SchedulerConfig
    max_len: int
    running: list[Sequence]
    waiting: WaitingQueue
    blocks: BlockAllocator
    only: frozenset[SequenceId] | None = None
    items: list[ScheduledSequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    budget: int = 0

    def plan(self) -> None:
        """Fill `items`, `preempted` and `admitted`."""
        self.budget = self.config.max_num_batched_tokens
        for sequence in [s for s in self.running if s.num_uncomputed == 1 and self._may_run(s)]:
            if sequence.status is SequenceStatus.RUNNING and self._grow(sequence):
                self._take(sequence)
        for sequence in self.running:
            if sequence.num_uncomputed > 1 and self.budget and self._may_run(sequence):
                self._take(sequence)
        self._admit()
        self._guess()

    def _may_run(self, sequence: Sequence) -> bool:
        return self.only is None or sequence.seq_id in self.only

    def _grow(self, sequence: Sequence) -> bool:
        """Get the block of the next token, at the cost of the latest admitted; False where that is `sequence`."""
        missing = blocks_for(sequence.num_tokens, self.config.block_size) - len(sequence.block_table)
        if missing <= 0:
            return True
        while missing > self.blocks.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += self.blocks.allocate(missing)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self.blocks.free(reversed(victim.block_table))
        victim.block_table.clear()
        victim.num_published = victim.num_computed = 0
        victim.lookup = None
        victim.num_preemptions += 1
        victim.status = SequenceStatus.WAITING
        self.waiting.push_front(victim)
        self.preempted.append(victim)

    def _take(self, sequence: Sequence) -> None:
        start, known = sequence.num_computed, sequence.num_tokens
        num_tokens = min(known - start, self.budget)
        stop = start + num_tokens
        self.budget -= num_tokens
        self.items.append(
            ScheduledSequence(
                sequence=sequence,
                start=start,
                num_tokens=num_tokens,
                token_ids=sequence.token_ids(start, stop),
                block_table=tuple(sequence.block_table[: blocks_for(stop, self.config.block_size)]),
                needs_token=stop == known and sequence.max_tokens > 0,
            )
        )

    def _admit(self) -> None:
        """Admit in the queue's order; nobody overtakes a head that does not fit, so it cannot starve.

        With `only`, who stands before one of them gets its blocks too, but is not computed.
        """
        if self.only is not None and not any(self._may_run(sequence) for sequence in self.waiting):
            return
        while self.budget and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting.head()
            if sequence is None:
                return
            found = self._find(sequence) if self.config.prefix_caching else []
            missing = blocks_for(sequence.num_tokens, self.config.block_size) - len(found)
            if missing + self._reserve() > self.blocks.num_free - self.blocks.num_idle(found):
                return
            self._start(sequence, found, missing)
            if self._may_run(sequence):
                self._take(sequence)

    def _find(self, sequence: Sequence) -> list[int]:
        """The blocks, from its first position on, that are in the KV cache and that it may read."""
        size = self.config.block_size
        found: list[int] = []
        for index in range(sequence.num_reusable // size):
            block = self.blocks.find(sequence.block_key(index, size))
            if block is None:
                break
            found.append(block)
        return found

    def _start(self, sequence: Sequence, found: list[int], missing: int) -> None:
        """The head of the queue runs from now on, behind what was found."""
        cached = len(found) * self.config.block_size
        self.waiting.pop(cached)
        self.blocks.share(found)
        sequence.block_table += found
        sequence.block_table += self.blocks.allocate(missing)
        sequence.num_published, sequence.num_computed, sequence.era = len(found), cached, self.blocks.era
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)
        self.admitted.append(sequence)
        if sequence.num_preemptions == 0:
            sequence.num_cached = cached

    def _guess(self) -> None:
        """Lengthen decodes by guesses, first come, first served, while few run."""
        lookup = self.config.prompt_lookup
        if lookup is None or self.only is not None or len(self.running) > lookup.max_batch:
            return
        for place, item in enumerate(self.items):
            if item.needs_token and item.num_tokens == 1 and item.sequence.output_ids:
                draft = self._draft(item.sequence, lookup)
                if draft:
                    self.items[place] = self._lengthened(item, draft)

    def _draft(self, sequence: Sequence, lookup: PromptLookupConfig) -> tuple[int, ...]:
        """Guesses that fit in what is left. One that would end the sequence is left to be sampled without guessing."""
        size = self.config.block_size
        free_positions = (len(sequence.block_table) + self.blocks.num_free) * size - sequence.num_tokens
        limit = min(lookup.tokens, self.budget, free_positions, sequence.tokens_left(self.max_len) - 1)
        if limit < 1:
            return ()
        if sequence.lookup is None:
            sequence.lookup = PromptLookup(lookup.ngram_min, lookup.ngram_max)
        sequence.lookup.extend(sequence.token_ids(len(sequence.lookup), sequence.num_tokens))
        stop_ids = sequence.stop_ids
        return tuple(takewhile(lambda token: token not in stop_ids, sequence.lookup.propose(limit)))

    def _lengthened(self, item: ScheduledSequence, draft: tuple[int, ...]) -> ScheduledSequence:
        table = item.sequence.block_table
        missing = blocks_for(item.stop + len(draft), self.config.block_size) - len(table)
        table += self.blocks.allocate(max(0, missing))
        self.budget -= len(draft)
        return replace(
            item,
            num_tokens=item.num_tokens + len(draft),
            token_ids=(*item.token_ids, *draft),
            block_table=tuple(table),
            num_draft=len(draft),
        )

    def _reserve(self) -> int:
        """Blocks to leave free: one for each running sequence that may still grow, so that it is not preempted soon."""
        size = self.config.block_size
        return sum(len(s.block_table) < blocks_for(s.final_computed(self.max_len), size) for s in self.running)
