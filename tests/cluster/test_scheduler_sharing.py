"""KV blocks shared by prefix: who finds what, who writes where, and what is forgotten when."""

import random
from collections import Counter
from collections.abc import Sequence as Items
from hashlib import blake2b

import pytest

from cluster.ids import SequenceId
from cluster.prefix_hash import COMMON_ROOT, block_key, root_key
from cluster.prompt_lookup import PromptLookupConfig
from cluster.scheduler import QueueFull, ScheduledBatch, Scheduler, SchedulerConfig
from cluster.sequence import FinishReason, Sequence
from tests.support.fake_model import VOCABULARY, PagedFakeModel, expected_output

SIZE = 4


def make(num_blocks: int = 32, **changes: object) -> Scheduler:
    limits: dict[str, object] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "block_size": SIZE,
        "max_waiting_requests": 64,
        "max_waiting_tokens": 1000,
        "max_model_len": 200,
        "prefix_caching": True,
    }
    return Scheduler(SchedulerConfig(**{**limits, **changes}), num_blocks)  # type: ignore[arg-type]


class Run:
    """A scheduler with the stand-in for a model, which checks all that it reads."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.model = PagedFakeModel(scheduler.blocks.num_blocks, scheduler.config.block_size)
        self.computed: Counter[SequenceId] = Counter()
        self.sequences: list[Sequence] = []

    def add(self, prompt: Items[int], max_tokens: int = 1, **limits: object) -> Sequence:
        one = Sequence(
            seq_id=SequenceId(len(self.sequences)), prompt_ids=prompt, max_tokens=max_tokens, ignore_eos=True, **limits
        )  # type: ignore[arg-type]
        self.scheduler.add(one)
        self.sequences.append(one)
        return one

    def begin(self) -> ScheduledBatch:
        batch = self.scheduler.schedule(0.0)
        self.model.write(batch)
        self.scheduler.check_integrity()
        return batch

    def end(self, batch: ScheduledBatch) -> None:
        for item in batch.items:
            self.computed[item.sequence.seq_id] += item.num_tokens
        self.scheduler.postprocess(batch, self.model.sample(batch))
        self.scheduler.check_integrity()

    def step(self) -> ScheduledBatch:
        batch = self.begin()
        self.end(batch)
        return batch

    def finish(self) -> None:
        while self.scheduler.num_running + self.scheduler.num_waiting:
            self.step()

    def ask(self, prompt: Items[int], max_tokens: int = 1, **limits: object) -> Sequence:
        """One alone, to its end."""
        one = self.add(prompt, max_tokens, **limits)
        self.finish()
        assert one.output_ids == expected_output(one, self.scheduler.max_model_len)
        return one


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=count)


@pytest.mark.parametrize(
    ("length", "found"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8), (12, 8), (13, 12)], ids=str
)
def test_whole_blocks_are_found_and_the_last_token_is_computed(length: int, found: int) -> None:
    run = Run(make())
    run.ask(tokens(length))
    again = run.ask(tokens(length))
    assert again.num_cached == found
    assert run.computed[again.seq_id] == length - found
    assert run.scheduler.counters.prefix_hits == found


def test_off_nothing_is_kept() -> None:
    run = Run(make(prefix_caching=False))
    assert [run.ask(tokens(20)).num_cached for _ in range(2)] == [0, 0]
    assert run.scheduler.blocks.num_cached == 0
    assert run.scheduler.counters.prefix_queries == 0


def test_what_differs_in_one_token_is_shared_up_to_there() -> None:
    run = Run(make(num_blocks=100))
    run.ask(tokens(40))
    for place in (0, 3, 4, 17, 38):
        other = tokens(40)
        other[place] = (other[place] + 1) % VOCABULARY
        assert run.ask(other).num_cached == place // SIZE * SIZE, place


def test_equal_tokens_elsewhere_are_not_equal_blocks() -> None:
    run = Run(make())
    run.ask(tokens(SIZE) * 3 + [1])
    assert run.scheduler.blocks.num_cached == 3
    assert run.ask([*tokens(SIZE, seed=1), *tokens(SIZE) * 2, 1]).num_cached == 0


def test_tenants_and_salts_do_not_meet() -> None:
    run = Run(make(num_blocks=64))
    roots = [root_key(*pair) for pair in [("", b""), ("a", b""), ("", b"a"), ("a", b"b"), ("ab", b""), ("b", b"a")]]
    assert len(set(roots)) == len(roots)
    assert roots[0] == COMMON_ROOT
    assert [run.ask(tokens(9), prefix_root=root).num_cached for root in roots] == [0] * len(roots)
    assert [run.ask(tokens(9), prefix_root=root).num_cached for root in roots] == [8] * len(roots)


def test_a_key_is_a_hash_of_all_that_it_stands_for() -> None:
    parent = root_key("tenant", b"salt")
    data = parent + b"".join(token.to_bytes(4, "little") for token in (1, 2, 70_000))
    assert block_key(parent, (1, 2, 70_000)) == blake2b(data, digest_size=32, person=b"octavo kv block").digest()
    keys = {block_key(parent, ids) for ids in ((1, 2), (2, 1), (1,), (1, 2, 0), (513,), (258, 0))}
    assert len(keys) == 6
    assert all(len(key) == 32 for key in keys)


def test_two_that_compute_the_same_side_by_side_hold_it_once_afterwards() -> None:
    run = Run(make())
    one, two = run.add(tokens(13), 8), run.add(tokens(13), 8)
    run.step()
    assert one.block_table[:3] == two.block_table[:3]
    assert one.block_table[3] != two.block_table[3]
    assert run.scheduler.blocks.num_blocks - run.scheduler.blocks.num_free == 3 + 2
    run.finish()
    assert one.output_ids == two.output_ids == expected_output(one, 200)


def test_a_block_that_is_held_takes_no_room_from_others_and_one_that_is_not_does() -> None:
    run = Run(make(num_blocks=9))
    run.add(tokens(17), 8)
    run.step()  # holds 5 of 9 blocks, and may grow by one
    second = run.add(tokens(17), 2)
    run.step()
    assert second.num_cached == 16
    assert second.output_ids, "one block more is enough"
    run.finish()
    assert run.scheduler.blocks.num_free == 9


def test_what_was_let_go_first_is_forgotten_first_and_the_end_of_a_prompt_before_its_beginning() -> None:
    run = Run(make(num_blocks=12))
    run.ask(tokens(17, seed=1))
    run.ask(tokens(17, seed=2))
    assert run.scheduler.blocks.num_cached == 8
    run.ask(tokens(21, seed=3))  # takes 4 that remember nothing and the last 2 of the first
    assert run.add(tokens(17, seed=1)).seq_id is not None
    assert run.begin().items[0].start == 8
    run = Run(make(num_blocks=12))
    run.ask(tokens(17, seed=1))
    run.ask(tokens(17, seed=2))
    run.ask(tokens(17, seed=1))  # is used again: now the second is the oldest
    run.ask(tokens(29, seed=3))
    assert run.ask(tokens(17, seed=1)).num_cached == 16
    assert run.ask(tokens(17, seed=2)).num_cached == 0


def test_a_preempted_sequence_finds_what_it_had() -> None:
    recomputed = []
    for prefix_caching in (True, False):
        run = Run(make(num_blocks=10, prefix_caching=prefix_caching))
        one, two = run.add(tokens(15, seed=1), 14), run.add(tokens(15, seed=2), 8)
        while not two.num_preemptions:
            run.step()
        had = two.peak_computed
        run.finish()
        for each in (one, two):
            assert each.output_ids == expected_output(each, 200)
        recomputed.append(run.scheduler.counters.recomputed_tokens)
        assert run.scheduler.counters.prefix_hits == 0, "what it had itself is no hit"
    assert (recomputed, had) == ([8, 20], 20), "but for the blocks that the other one took"


def test_a_dropped_or_abandoned_step_publishes_nothing() -> None:
    run = Run(make())
    one = run.add(tokens(16), 4)
    batch = run.begin()
    run.scheduler.cancel(one.seq_id)
    run.end(batch)
    assert run.scheduler.blocks.num_cached == 0
    run.add(tokens(16), 4)
    run.scheduler.abandon(run.begin())
    assert run.scheduler.blocks.num_cached == 0
    run.finish()
    assert run.scheduler.blocks.num_cached == 4


def test_a_long_prompt_is_shared_chunk_by_chunk_while_it_is_computed() -> None:
    run = Run(make(max_num_batched_tokens=10))
    run.add(tokens(30))
    run.step()
    assert run.scheduler.blocks.num_cached == 2
    second = run.add(tokens(30))
    run.finish()
    assert second.num_cached == 28, "it was admitted when the first one was done"


def test_who_failed_leaves_nothing_and_who_shares_with_it_goes_on() -> None:
    run = Run(make())
    one, two = run.add(tokens(16), 8), run.add(tokens(16), 8)
    run.step()
    run.scheduler.fail(one.seq_id)
    run.scheduler.check_integrity()
    assert run.scheduler.blocks.num_cached == 0
    run.finish()
    assert two.output_ids == expected_output(two, 200)
    assert run.ask(tokens(16)).num_cached == 0


def test_what_began_before_all_was_forgotten_is_not_shared_and_what_begins_after_is() -> None:
    run = Run(make())
    one = run.add(tokens(16), 12)
    run.step()
    run.scheduler.forget_prefixes()
    run.scheduler.check_integrity()
    run.finish()
    assert one.finish_reason is FinishReason.LENGTH
    assert run.scheduler.blocks.num_cached == 0
    assert run.ask(tokens(16)).num_cached == 0
    assert run.ask(tokens(16)).num_cached == 12


def test_starting_over_forgets_everything() -> None:
    run = Run(make())
    run.ask(tokens(16))
    one = run.add(tokens(16), 4)
    run.step()
    run.scheduler.start_over([one])
    run.scheduler.check_integrity()
    assert run.scheduler.blocks.num_cached == 0
    run.finish()
    assert one.output_ids == expected_output(one, 200)


def test_integrity_notices_a_shared_block_that_may_be_written() -> None:
    run = Run(make())
    one = run.add(tokens(14), 8)
    run.step()
    run.scheduler.blocks.publish(one.block_table[3], b"not whole")
    with pytest.raises(AssertionError, match="can be found, or is shared, but may be written"):
        run.scheduler.check_integrity()


def test_integrity_notices_a_block_under_a_strange_key() -> None:
    run = Run(make())
    one = run.add(tokens(14), 8)
    run.step()
    run.scheduler.blocks.forget(one.block_table[:1])
    run.scheduler.blocks.publish(one.block_table[0], b"another prompt's")
    with pytest.raises(AssertionError, match="has a strange key"):
        run.scheduler.check_integrity()


@pytest.mark.parametrize("seed", range(40))
def test_crowds_with_common_beginnings_get_the_answers_of_one_who_is_alone(seed: int) -> None:
    """Too little room, few beginnings, guesses, failures: every read is checked, every book audited at every step."""
    draw = random.Random(seed)
    lookup = PromptLookupConfig(tokens=3, ngram_min=1, ngram_max=2, max_batch=3) if seed % 2 else None
    size = draw.choice([1, 2, 4])
    run = Run(
        make(
            num_blocks=draw.randint(48, 160) // size,
            block_size=size,
            max_num_batched_tokens=draw.randint(4, 30),
            prompt_lookup=lookup,
        )
    )
    for _ in range(60):
        beginning = tokens(draw.randint(0, 24), seed=draw.randint(0, 1))
        prompt = [*beginning, *tokens(draw.randint(1, 5), seed=draw.randint(2, 5))]
        if len(prompt) + 10 < run.scheduler.max_model_len:
            root = root_key(draw.choice(["", "", "", "a"]), b"")
            try:
                run.add(prompt, draw.randint(1, 9), prefix_root=root, wants_prompt_logprobs=draw.random() < 0.1)
            except QueueFull:
                continue
        for _ in range(draw.choice([0, 0, 1, 3])):
            batch = run.begin()
            fate = draw.random()
            if fate < 0.05:
                run.scheduler.abandon(batch)
                continue
            if fate < 0.15 and batch.items:
                run.scheduler.fail(draw.choice(batch.items).sequence.seq_id)
            run.end(batch)
        if draw.random() < 0.02:
            run.scheduler.forget_prefixes()
    run.finish()
    assert run.scheduler.blocks.num_free == run.scheduler.blocks.num_blocks
    assert run.scheduler.counters.prefix_hits > 20
    for one in run.sequences:
        expected = expected_output(one, run.scheduler.max_model_len)
        if one.finish_reason is FinishReason.ERROR:
            expected = expected[: len(one.output_ids)]
        assert one.output_ids == expected
