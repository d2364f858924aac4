"""What a guess may take and what becomes of it: leftovers only, and nothing is kept of one that was wrong."""

import pytest

from cluster.ids import SequenceId
from cluster.prompt_lookup import PromptLookupConfig
from cluster.scheduler import ScheduledBatch, ScheduledSequence, Scheduler, SchedulerConfig
from cluster.sequence import FinishReason, Sequence

ONE = SequenceId(1)
SAYING = [5, 6, 7, 8]


def make(num_blocks: int = 16, tokens: int = 3, max_batch: int = 4, **changes: int) -> Scheduler:
    limits = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "block_size": 4,
        "max_waiting_requests": 8,
        "max_waiting_tokens": 1000,
        "max_model_len": 1000,
        **changes,
    }
    lookup = PromptLookupConfig(tokens=tokens, ngram_max=3, ngram_min=2, max_batch=max_batch)
    return Scheduler(SchedulerConfig(**limits, prompt_lookup=lookup), num_blocks)


def sequence(seq_id: int = 1, max_tokens: int = 20, stop: frozenset[int] = frozenset()) -> Sequence:
    """A prompt of 7 tokens, 5 6 7 8 50 5 6: after the token 7 comes the guess 8 50 5."""
    prompt = [*SAYING, 50, *SAYING[:2]]
    return Sequence(seq_id=SequenceId(seq_id), prompt_ids=prompt, max_tokens=max_tokens, stop_token_ids=stop)


def prefilled(scheduler: Scheduler, *sequences: Sequence, token: int = 7) -> ScheduledBatch:
    """Prompts computed and a token received: the step after that, which may guess."""
    for one in sequences:
        scheduler.add(one)
    while any(not one.output_ids for one in sequences):
        batch = scheduler.schedule(0.0)
        assert not any(item.num_draft for item in batch.items if not item.sequence.output_ids)
        scheduler.postprocess(batch, {i.sequence.seq_id: [token] for i in batch.items if i.needs_token})
    return scheduler.schedule(0.0)


def only(batch: ScheduledBatch) -> ScheduledSequence:
    (item,) = batch.items
    return item


def test_a_decode_is_lengthened_by_its_guesses() -> None:
    scheduler = make()
    item = only(prefilled(scheduler, sequence()))
    assert (item.start, item.num_tokens, item.known_stop, item.stop) == (7, 4, 8, 11)
    assert item.token_ids == (7, 8, 50, 5)
    assert item.draft_ids == (8, 50, 5)
    assert len(item.block_table) == 3, "11 positions"
    scheduler.check_integrity()


@pytest.mark.parametrize(
    ("sampled", "computed", "num_blocks"),
    [([9], 8, 2), ([8, 9], 9, 3), ([8, 50, 9], 10, 3), ([8, 50, 5, 9], 11, 3)],
    ids=["none", "one", "two", "all"],
)
def test_what_came_true_is_kept_and_the_blocks_of_the_rest_are_not(
    sampled: list[int], computed: int, num_blocks: int
) -> None:
    scheduler = make()
    one = sequence()
    batch = prefilled(scheduler, one)
    (update,) = scheduler.postprocess(batch, {ONE: sampled})
    assert update.tokens == tuple(sampled)
    assert one.output_ids == [7, *sampled]
    assert (one.num_computed, one.num_uncomputed, len(one.block_table)) == (computed, 1, num_blocks)
    scheduler.check_integrity()
    counters = scheduler.counters
    assert (counters.draft_tokens, counters.accepted_draft_tokens) == (3, len(sampled) - 1)
    assert (counters.generated_tokens, counters.prompt_tokens, counters.recomputed_tokens) == (1 + len(sampled), 7, 0)


def test_fewer_tokens_than_came_true_leave_the_last_to_be_computed_again() -> None:
    """As when a row could not be sampled: what is told of a guess that came true is simply a token."""
    scheduler = make()
    one = sequence()
    scheduler.postprocess(prefilled(scheduler, one), {ONE: [8, 50]})
    assert (one.num_computed, one.num_tokens) == (9, 10)
    assert only(scheduler.schedule(0.0)).token_ids[0] == 50


def test_tokens_that_contradict_the_guess_before_them_are_a_bug() -> None:
    scheduler = make()
    with pytest.raises(AssertionError, match="9, 50"):
        scheduler.postprocess(prefilled(scheduler, sequence()), {ONE: [9, 50]})


def test_an_abandoned_guess_leaves_nothing_behind() -> None:
    scheduler = make()
    one = sequence()
    before = prefilled(scheduler, one)
    scheduler.abandon(before)
    assert (one.num_computed, len(one.block_table), one.output_ids) == (7, 2, [7])
    scheduler.check_integrity()
    assert scheduler.counters.draft_tokens == 0
    assert only(scheduler.schedule(0.0)).token_ids == only(before).token_ids


def test_who_is_cancelled_with_guesses_in_flight_gives_back_all_blocks() -> None:
    scheduler = make()
    one = sequence()
    batch = prefilled(scheduler, one)
    scheduler.cancel(ONE)
    scheduler.check_integrity()
    assert scheduler.postprocess(batch, {ONE: [8, 50]}) == []
    assert scheduler.blocks.num_free == 16
    assert one.lookup is None


def test_guesses_take_the_budget_that_others_leave() -> None:
    scheduler = make(max_num_batched_tokens=21, tokens=8)
    batch = prefilled(scheduler, sequence(1), sequence(2), sequence(3))
    assert [item.num_draft for item in batch.items] == [8, 8, 2], "21 tokens: 3 known, 18 guessed"
    scheduler.abandon(batch)
    scheduler.add(Sequence(seq_id=SequenceId(4), prompt_ids=range(5), max_tokens=1))
    batch = scheduler.schedule(0.0)
    assert [(item.sequence.seq_id, item.num_tokens) for item in batch.items] == [(1, 9), (2, 6), (3, 1), (4, 5)]


def test_guesses_take_blocks_that_are_free_and_lend_them_for_one_step() -> None:
    scheduler = make(num_blocks=5, tokens=8)
    batch = prefilled(scheduler, sequence(1), sequence(2))
    assert [item.stop for item in batch.items] == [12, 8], "the fifth block holds 4 guesses of the first"
    assert scheduler.blocks.num_free == 0
    scheduler.postprocess(batch, {ONE: [9], SequenceId(2): [9]})
    assert scheduler.blocks.num_free == 1


@pytest.mark.parametrize(("max_tokens", "num_draft"), [(2, 0), (3, 1), (4, 2), (5, 3), (6, 3)])
def test_guesses_leave_the_last_token_to_be_sampled(max_tokens: int, num_draft: int) -> None:
    scheduler = make()
    one = sequence(max_tokens=max_tokens)
    item = only(batch := prefilled(scheduler, one))
    assert item.num_draft == num_draft
    (update,) = scheduler.postprocess(batch, {ONE: [*item.draft_ids, 9]})
    assert update.finish_reason is (FinishReason.LENGTH if num_draft == max_tokens - 2 else None)
    scheduler.check_integrity()


def test_a_token_that_would_end_the_sequence_is_never_guessed() -> None:
    assert only(prefilled(make(), sequence(stop=frozenset({50})))).draft_ids == (8,)
    assert only(prefilled(make(), sequence(stop=frozenset({8})))).draft_ids == ()


def test_nothing_is_guessed_where_nothing_repeats_or_many_run_or_nobody_asked() -> None:
    assert only(prefilled(make(), sequence(), token=99)).num_draft == 0
    crowded = prefilled(make(max_batch=2), sequence(1), sequence(2), sequence(3))
    assert [item.num_draft for item in crowded.items] == [0, 0, 0]
    plain = make()
    plain.config = SchedulerConfig(
        **{name: getattr(plain.config, name) for name in SchedulerConfig.__slots__ if name != "prompt_lookup"}
    )
    one = sequence()
    assert only(prefilled(plain, one)).num_draft == 0
    assert one.lookup is None


def test_a_sequence_that_scores_its_prompt_only_is_not_guessed_for() -> None:
    scheduler = make(max_num_batched_tokens=6)
    scoring = Sequence(seq_id=ONE, prompt_ids=SAYING * 2, max_tokens=0, wants_prompt_logprobs=True)
    scheduler.add(scoring)
    while not scoring.is_finished:
        batch = scheduler.schedule(0.0)
        assert only(batch).num_draft == 0
        scheduler.postprocess(batch, {})


def test_a_preempted_sequence_gives_up_its_index_with_its_blocks() -> None:
    scheduler = make(num_blocks=6, max_model_len=20)
    first, second = sequence(1), sequence(2)
    batch = prefilled(scheduler, first, second)
    assert [item.num_draft for item in batch.items] == [3, 3]
    while not batch.preempted:
        assert second.lookup is not None
        scheduler.postprocess(batch, {i.sequence.seq_id: [9] for i in batch.items if i.needs_token})
        batch = scheduler.schedule(0.0)
    assert batch.preempted == (second,)
    assert second.lookup is None
    assert first.lookup is not None
