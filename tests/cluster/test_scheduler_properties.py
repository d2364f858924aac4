"""Whatever happens to a scheduler with far too little memory, its answers are those of one with plenty.

Guessing and sharing KV blocks included: they may make answers come sooner, and change nothing else.
"""

import copy
import dataclasses

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cluster.ids import SequenceId
from cluster.prefix_hash import root_key
from cluster.prompt_lookup import PromptLookupConfig
from cluster.scheduler import (
    QueueFull,
    RequestTooLong,
    ScheduledBatch,
    ScheduledSequence,
    Scheduler,
    SchedulerConfig,
)
from cluster.sequence import FinishReason, Sequence
from tests.support.fake_model import EOS, VOCABULARY, PagedFakeModel, expected_output

TOKEN_IDS = st.integers(0, VOCABULARY - 1)
PREFIX = (5, 1, 7, 5, 2, 9, 5, 1, 7, 4)
"""What many prompts begin with."""
TENANTS = ("", "", "", "", "one")
OWN_ENDS = (FinishReason.STOP, FinishReason.LENGTH)


@st.composite
def lookups(draw: st.DrawFn) -> PromptLookupConfig:
    ngram_min = draw(st.integers(1, 2))
    return PromptLookupConfig(
        tokens=draw(st.integers(1, 5)),
        ngram_min=ngram_min,
        ngram_max=ngram_min + draw(st.integers(0, 2)),
        max_batch=draw(st.integers(1, 5)),
    )


def plain_plan(scheduler: Scheduler, now_s: float) -> ScheduledBatch:
    """The step that `scheduler` would plan next if it did not guess."""
    twin = copy.deepcopy(scheduler)
    twin.config = dataclasses.replace(twin.config, prompt_lookup=None)
    return twin.schedule(now_s)


def without_guesses(batch: ScheduledBatch) -> list[tuple[object, ...]]:
    return [
        (item.sequence.seq_id, item.start, item.known_stop, item.token_ids[: item.num_tokens - item.num_draft])
        for item in batch.items
    ]


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, cancels, deadlines and failures at every moment, in the middle of steps too, over a tiny pool."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.batch: ScheduledBatch | None = None
        self.sequences: list[Sequence] = []
        self.updates: dict[SequenceId, list[int]] = {}
        self.scored: dict[SequenceId, list[int]] = {}
        self.experts: dict[SequenceId, set[int]] = {}
        self.ended: list[SequenceId] = []

    @initialize(
        num_blocks=st.sampled_from([4, 5, 6, 7, 8, 16, 24]),
        block_size=st.sampled_from([1, 2, 2, 4]),
        max_num_seqs=st.integers(2, 5),
        spare_budget=st.integers(0, 12),
        max_waiting_requests=st.integers(2, 6),
        max_waiting_tokens=st.integers(8, 60),
        max_model_len=st.integers(6, 40),
        prompt_lookup=st.one_of(st.none(), lookups(), lookups(), lookups()),
        prefix_caching=st.sampled_from([True, True, False]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        spare_budget: int,
        max_waiting_requests: int,
        max_waiting_tokens: int,
        max_model_len: int,
        prompt_lookup: PromptLookupConfig | None,
        prefix_caching: bool,
    ) -> None:
        self.config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_budget,
            block_size=block_size,
            max_waiting_requests=max_waiting_requests,
            max_waiting_tokens=max_waiting_tokens,
            max_model_len=max_model_len,
            prompt_lookup=prompt_lookup,
            prefix_caching=prefix_caching,
        )
        self.scheduler = Scheduler(self.config, num_blocks)
        self.model = PagedFakeModel(num_blocks, block_size)

    @rule(
        common=st.sampled_from([0, 0, 3, 5, 6, 8]),
        own=st.lists(TOKEN_IDS, max_size=7),
        max_tokens=st.sampled_from([0, 1, 2, 8, 10, 12, 14, 18]),
        min_tokens=st.integers(0, 6),
        stop=st.frozensets(TOKEN_IDS, max_size=1),
        ignore_eos=st.sampled_from([True, True, False]),
        patience_s=st.sampled_from([None, None, None, 5, 20]),
        scored=st.sampled_from([False, False, False, True]),
        told_experts=st.sampled_from([False] * 5 + [True]),
        tenant=st.sampled_from(TENANTS),
    )
    def add(
        self,
        common: int,
        own: list[int],
        max_tokens: int,
        min_tokens: int,
        stop: frozenset[int],
        ignore_eos: bool,
        patience_s: int | None,
        scored: bool,
        told_experts: bool,
        tenant: str,
    ) -> None:
        prompt = [*PREFIX[:common], *own] or [0]
        sequence = Sequence(
            seq_id=SequenceId(len(self.sequences)),
            prompt_ids=tuple(prompt),
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            eos_token_ids=frozenset([EOS]),
            stop_token_ids=stop,
            ignore_eos=ignore_eos,
            deadline_s=None if patience_s is None else self.now_s + patience_s,
            wants_prompt_logprobs=scored or max_tokens == 0,
            wants_routed_experts=told_experts,
            prefix_root=root_key(tenant, b""),
        )
        waiting, tokens = self.scheduler.num_waiting, self.scheduler.num_waiting_tokens
        try:
            self.scheduler.add(sequence)
        except QueueFull:
            limits = self.config.max_waiting_requests, self.config.max_waiting_tokens
            assert waiting >= limits[0] or tokens + len(prompt) > limits[1]
        except RequestTooLong:
            room = min(self.scheduler.max_model_len, self.config.max_waiting_tokens)
            assert len(prompt) + min(1, max_tokens) > room
        else:
            self.sequences.append(sequence)
            assert self.scheduler.num_waiting <= self.config.max_waiting_requests
            assert self.scheduler.num_waiting_tokens <= self.config.max_waiting_tokens

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), fail=st.booleans())
    def drop(self, data: st.DataObject, fail: bool) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        was_alive = not sequence.is_finished
        end = self.scheduler.fail if fail else self.scheduler.cancel
        assert end(sequence.seq_id) == was_alive
        assert sequence.is_finished

    @rule(seconds=st.integers(1, 10), look=st.booleans())
    def wait(self, seconds: int, look: bool) -> None:
        self.now_s += seconds
        if look:
            for sequence in self.scheduler.expire(self.now_s):
                assert sequence.finish_reason is FinishReason.EXPIRED

    @precondition(lambda self: self.batch is None)
    @rule()
    def begin_step(self) -> None:
        had_work = self.scheduler.num_running + self.scheduler.num_waiting
        plain = plain_plan(self.scheduler, self.now_s)
        batch = self.batch = self.scheduler.schedule(self.now_s)
        assert without_guesses(batch) == without_guesses(plain), "guesses displace nobody"
        assert [one.seq_id for one in batch.preempted] == [one.seq_id for one in plain.preempted]
        for item in batch.items:
            self.check_guesses(item)
        alive = self.scheduler.num_running + self.scheduler.num_waiting
        assert alive == had_work - len(batch.expired)
        assert bool(batch.items) == bool(alive), "a step with work to do does some of it"
        assert batch.num_tokens <= self.config.max_num_batched_tokens
        assert len({item.sequence for item in batch.items}) == len(batch.items) <= self.config.max_num_seqs
        for item in batch.items:
            for index in range(item.start // self.config.block_size, len(item.block_table)):
                block = item.block_table[index]
                books = self.scheduler.blocks
                assert (books.holders(block), books.key(block)) == (1, None), "a shared block is written"
            self.experts.setdefault(item.sequence.seq_id, set()).update(range(item.start, item.stop))
        self.model.write(batch)

    def check_guesses(self, item: ScheduledSequence) -> None:
        lookup = self.config.prompt_lookup
        assert item.known_stop <= item.sequence.num_tokens
        if item.num_draft:
            assert lookup is not None
            assert item.num_draft <= lookup.tokens
            assert self.scheduler.num_running <= lookup.max_batch
            assert item.num_draft < item.sequence.tokens_left(self.scheduler.max_model_len)
            assert not item.sequence.stop_ids.intersection(item.draft_ids)

    @precondition(lambda self: self.batch is not None)
    @rule()
    def end_step(self) -> None:
        assert self.batch is not None
        batch, self.batch = self.batch, None
        tokens = self.model.sample(batch)
        for item in batch.items:
            positions = [item.start + row + 1 for row in item.prompt_rows]
            self.scored.setdefault(item.sequence.seq_id, []).extend(positions)
        for update in self.scheduler.postprocess(batch, tokens):
            seq_id = update.sequence.seq_id
            assert seq_id not in self.ended, "nothing comes after the end"
            self.updates.setdefault(seq_id, []).extend(update.tokens)
            if update.finish_reason is not None:
                self.ended.append(seq_id)

    @precondition(lambda self: self.batch is None)
    @rule(num_steps=st.integers(1, 6))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.begin_step()
            self.end_step()
            self.is_sound()

    @rule()
    def distrust(self) -> None:
        self.scheduler.forget_prefixes()
        assert self.scheduler.blocks.num_cached == 0

    @precondition(lambda self: self.batch is not None)
    @rule()
    def lose_step(self) -> None:
        assert self.batch is not None
        self.scheduler.abandon(self.batch)
        self.batch = None

    @invariant()
    def is_sound(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        allowed = self.config.max_waiting_requests + self.config.max_num_seqs
        assert self.scheduler.num_waiting <= allowed

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        if self.batch is not None:
            self.end_step()
        for _ in range(2_000):
            if not self.scheduler.num_running + self.scheduler.num_waiting:
                break
            self.begin_step()
            self.end_step()
            self.is_sound()
        assert all(sequence.is_finished for sequence in self.sequences), "somebody starves"
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks
        assert self.scheduler.num_waiting_tokens == 0
        for sequence in self.sequences:
            self.check_answer(sequence)
        counters = self.scheduler.counters
        assert counters.generated_tokens == sum(len(tokens) for tokens in self.updates.values())
        assert counters.preemptions == sum(sequence.num_preemptions for sequence in self.sequences)
        computed = sum(min(s.peak_computed, s.num_prompt) for s in self.sequences)
        fresh = sum(max(0, min(s.peak_computed, s.num_prompt) - s.num_cached_prompt) for s in self.sequences)
        if counters.preemptions:  # who starts again may find more than before, or less
            assert counters.prompt_tokens <= computed
        else:
            assert counters.prompt_tokens == fresh
        assert counters.prefix_hits == sum(s.num_cached for s in self.sequences)
        assert self.config.prefix_caching or not counters.prefix_queries
        assert counters.accepted_draft_tokens <= counters.draft_tokens
        assert all(sequence.lookup is None for sequence in self.sequences), "an index outlives its sequence"
        ACCEPTED.append(counters.accepted_draft_tokens)
        HITS.append(counters.prefix_hits)

    def check_answer(self, sequence: Sequence) -> None:
        expected = expected_output(sequence, self.scheduler.max_model_len)
        tokens = self.updates.get(sequence.seq_id, [])
        assert tokens == sequence.output_ids
        scored = self.scored.get(sequence.seq_id, [])
        whole = list(range(1, sequence.num_prompt)) if sequence.wants_prompt_logprobs else []
        assert scored == whole[: len(scored)], "each prompt position is scored once, in order"
        if sequence.finish_reason in OWN_ENDS:
            assert tokens == expected
            assert scored == whole
            stopped = bool(tokens) and tokens[-1] in sequence.stop_ids
            assert (sequence.finish_reason is FinishReason.STOP) == stopped
            assert sequence.seq_id in self.ended
        else:
            assert tokens == expected[: len(tokens)]
            assert sequence.seq_id not in self.ended

        if sequence.wants_routed_experts:
            computed = self.experts.get(sequence.seq_id, set())
            assert computed >= set(range(sequence.peak_computed)), "somebody must say which experts it took"


ACCEPTED: list[int] = []
HITS: list[int] = []


def test_random_histories_are_exact_sound_and_come_to_an_end() -> None:
    ACCEPTED.clear()
    HITS.clear()
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(max_examples=300, stateful_step_count=50, deadline=None, derandomize=True),
    )
    assert sum(ACCEPTED) > 100, "guesses that never come true prove nothing"
    assert sum(HITS) > 50, "prefixes that are never found prove nothing"
