"""The scheduler's promises one by one, each in the smallest case that shows it."""

from collections.abc import Iterable

import pytest

from cluster.ids import SequenceId
from cluster.scheduler import (
    QueueFull,
    RequestTooLong,
    ScheduledBatch,
    Scheduler,
    SchedulerConfig,
    SequenceUpdate,
)
from cluster.sequence import FinishReason, Sequence, SequenceStatus
from tests.support.fake_model import EOS, PagedFakeModel, expected_output


def make(num_blocks: int = 16, **changes: int) -> Scheduler:
    limits = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 8,
        "block_size": 4,
        "max_waiting_requests": 8,
        "max_waiting_tokens": 1000,
        "max_model_len": 1000,
    }
    return Scheduler(SchedulerConfig(**{**limits, **changes}), num_blocks)


def sequence(
    seq_id: int,
    length: int,
    max_tokens: int = 4,
    *,
    stop: Iterable[int] = (),
    deadline_s: float | None = None,
    wants_prompt_logprobs: bool = False,
) -> Sequence:
    return Sequence(
        seq_id=SequenceId(seq_id),
        prompt_ids=[seq_id * 100 + position for position in range(length)],
        max_tokens=max_tokens,
        stop_token_ids=frozenset(stop),
        deadline_s=deadline_s,
        wants_prompt_logprobs=wants_prompt_logprobs,
    )


def added(scheduler: Scheduler, *sequences: Sequence) -> None:
    for each in sequences:
        scheduler.add(each)


def shares(batch: ScheduledBatch) -> list[tuple[int, int, int]]:
    return [(item.sequence.seq_id, item.start, item.num_tokens) for item in batch.items]


def step(scheduler: Scheduler, now_s: float = 0.0, token: int = 7) -> list[SequenceUpdate]:
    batch = scheduler.schedule(now_s)
    updates = scheduler.postprocess(batch, {i.sequence.seq_id: [token] for i in batch.items if i.needs_token})
    scheduler.check_integrity()
    return updates


def test_a_prompt_is_prefilled_then_decoded_token_by_token() -> None:
    scheduler = make()
    only = sequence(1, 5, max_tokens=2)
    scheduler.add(only)
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens, scheduler.num_running) == (1, 5, 0)
    batch = scheduler.schedule(0.0)
    (item,) = batch.items
    assert (item.start, item.num_tokens, item.stop, item.needs_token) == (0, 5, 5, True)
    assert item.token_ids == (100, 101, 102, 103, 104)
    assert len(item.block_table) == 2
    (update,) = scheduler.postprocess(batch, {SequenceId(1): [42]})
    assert (update.tokens, update.finish_reason) == ((42,), None)
    batch = scheduler.schedule(1.0)
    (item,) = batch.items
    assert (item.start, item.num_tokens, item.token_ids) == (5, 1, (42,))
    (update,) = scheduler.postprocess(batch, {SequenceId(1): [43]})
    assert (update.tokens, update.finish_reason) == ((43,), FinishReason.LENGTH)
    assert only.output_ids == [42, 43]
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.blocks.num_free) == (0, 0, 16)


def test_an_idle_scheduler_plans_nothing() -> None:
    scheduler = make()
    batch = scheduler.schedule(0.0)
    assert (batch.items, batch.expired, batch.preempted, batch.num_tokens) == ((), (), (), 0)
    assert scheduler.postprocess(batch, {}) == []


def test_decodes_go_first_then_running_prefills_then_admissions_within_the_budget() -> None:
    scheduler = make()
    added(scheduler, sequence(1, 3), sequence(2, 20), sequence(3, 2))
    seen = []
    for _ in range(5):
        batch = scheduler.schedule(0.0)
        seen.append(shares(batch))
        scheduler.postprocess(batch, {i.sequence.seq_id: [7] for i in batch.items if i.needs_token})
    assert seen == [
        [(1, 0, 3), (2, 0, 5)],
        [(1, 3, 1), (2, 5, 7)],
        [(1, 4, 1), (2, 12, 7)],
        [(1, 5, 1), (2, 19, 1), (3, 0, 2)],
        [(2, 20, 1), (3, 2, 1)],
    ]


def test_an_unfinished_prefill_needs_no_token_and_gives_no_update() -> None:
    scheduler = make()
    scheduler.add(sequence(1, 9))
    batch = scheduler.schedule(0.0)
    assert [item.needs_token for item in batch.items] == [False]
    assert scheduler.postprocess(batch, {}) == []


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = make(max_num_seqs=2)
    added(scheduler, *(sequence(i, 1) for i in range(4)))
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 2)


def test_a_stop_token_ends_and_is_kept() -> None:
    scheduler = make()
    stopped = sequence(1, 2, stop=[7])
    scheduler.add(stopped)
    (update,) = step(scheduler, token=7)
    assert update.finish_reason is stopped.finish_reason is FinishReason.STOP
    assert stopped.output_ids == [7]


def test_the_model_length_ends_a_sequence_before_max_tokens() -> None:
    scheduler = make(max_model_len=6)
    long = sequence(1, 4, max_tokens=100)
    scheduler.add(long)
    assert [step(scheduler)[0].finish_reason for _ in range(2)] == [None, FinishReason.LENGTH]
    assert long.num_tokens == 6


def test_a_small_kv_cache_lowers_the_model_length() -> None:
    scheduler = make(num_blocks=2, max_model_len=1000)
    assert scheduler.max_model_len == 8
    scheduler.add(sequence(1, 7, max_tokens=1000))
    assert step(scheduler)[0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("length", "max_tokens", "fits"), [(7, 1, True), (8, 1, False), (8, 0, True), (9, 0, False)])
def test_what_can_never_fit_is_refused_at_once(length: int, max_tokens: int, fits: bool) -> None:
    scheduler = make(num_blocks=2)
    wanted = sequence(1, length, max_tokens, wants_prompt_logprobs=max_tokens == 0)
    if fits:
        scheduler.add(wanted)
        assert step(scheduler) == [
            SequenceUpdate(sequence=wanted, tokens=(7,) if max_tokens else (), finish_reason=FinishReason.LENGTH)
        ]
    else:
        with pytest.raises(RequestTooLong, match=rf"prompt has {length} tokens.*max_model_len is 8"):
            scheduler.add(wanted)
        assert scheduler.num_waiting == 0


def test_a_prompt_longer_than_the_queue_is_refused_for_good() -> None:
    scheduler = make(max_waiting_tokens=10)
    with pytest.raises(RequestTooLong, match="max_waiting_tokens is 10"):
        scheduler.add(sequence(1, 11))


def test_the_queue_is_bounded_in_requests_and_in_tokens() -> None:
    scheduler = make(max_waiting_requests=2, max_waiting_tokens=10)
    added(scheduler, sequence(1, 4), sequence(2, 4))
    with pytest.raises(QueueFull, match="max_waiting_requests is 2"):
        scheduler.add(sequence(3, 1))
    scheduler.cancel(SequenceId(2))
    with pytest.raises(QueueFull, match="max_waiting_tokens is 10"):
        scheduler.add(sequence(4, 7))
    scheduler.add(sequence(5, 6))
    scheduler.check_integrity()


def test_an_id_in_use_is_refused_and_free_again_after_the_end() -> None:
    scheduler = make()
    scheduler.add(sequence(1, 2))
    with pytest.raises(ValueError, match="seq_id 1 is already in use"):
        scheduler.add(sequence(1, 2))
    scheduler.cancel(SequenceId(1))
    scheduler.add(sequence(1, 2))


def test_cancelling_a_waiting_sequence_frees_its_place_at_once() -> None:
    scheduler = make(max_waiting_requests=1)
    scheduler.add(sequence(1, 2))
    assert scheduler.cancel(SequenceId(1))
    assert not scheduler.cancel(SequenceId(1))
    scheduler.add(sequence(2, 2))
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens) == (1, 2)


def test_cancelling_a_running_sequence_between_steps_frees_its_blocks_at_once() -> None:
    scheduler = make()
    scheduler.add(sequence(1, 6))
    step(scheduler)
    assert scheduler.blocks.num_free == 14
    scheduler.cancel(SequenceId(1))
    assert (scheduler.blocks.num_free, scheduler.num_running) == (16, 0)
    scheduler.check_integrity()


def test_blocks_of_a_sequence_in_the_running_step_are_freed_when_it_is_over() -> None:
    scheduler = make(num_blocks=4)
    first, second = sequence(1, 6), sequence(2, 12)
    scheduler.add(first)
    batch = scheduler.schedule(0.0)
    assert scheduler.cancel(SequenceId(1))
    assert first.is_finished
    assert (scheduler.num_running, scheduler.blocks.num_free) == (0, 2)
    scheduler.add(second)
    scheduler.check_integrity()
    assert scheduler.postprocess(batch, {SequenceId(1): [9]}) == [], "its result is dropped"
    assert first.output_ids == []
    assert scheduler.blocks.num_free == 4
    assert shares(scheduler.schedule(0.0)) == [(2, 0, 8)]


def test_a_dropped_sequence_needs_no_token() -> None:
    scheduler = make()
    added(scheduler, sequence(1, 2), sequence(2, 2))
    batch = scheduler.schedule(0.0)
    scheduler.fail(SequenceId(1))
    (update,) = scheduler.postprocess(batch, {SequenceId(2): [5]})
    assert update.sequence.seq_id == 2


def test_a_missing_token_is_noticed_before_anything_changes() -> None:
    scheduler = make()
    added(scheduler, sequence(1, 2), sequence(2, 2))
    batch = scheduler.schedule(0.0)
    with pytest.raises(AssertionError, match=r"no token for sequences \[2\]"):
        scheduler.postprocess(batch, {SequenceId(1): [5]})
    assert len(scheduler.postprocess(batch, {SequenceId(1): [5], SequenceId(2): [5]})) == 2


def test_one_step_is_in_flight_at_a_time() -> None:
    scheduler = make()
    batch = scheduler.schedule(0.0)
    with pytest.raises(AssertionError, match="still in flight"):
        scheduler.schedule(0.0)
    scheduler.postprocess(batch, {})
    with pytest.raises(AssertionError, match="not the one in flight"):
        scheduler.postprocess(batch, {})


def test_an_abandoned_step_is_done_again() -> None:
    scheduler = make()
    added(scheduler, sequence(1, 5), sequence(2, 2))
    batch = scheduler.schedule(0.0)
    scheduler.cancel(SequenceId(2))
    scheduler.abandon(batch)
    scheduler.check_integrity()
    again = scheduler.schedule(0.0)
    assert shares(again) == [(1, 0, 5)]
    assert again.items[0].block_table == batch.items[0].block_table
    assert scheduler.counters.steps == 0


def test_a_step_can_be_kept_to_a_few_and_the_others_lose_nothing() -> None:
    scheduler = make()
    first, second, third = sequence(1, 5), sequence(2, 2), sequence(3, 3)
    added(scheduler, first, second)
    step(scheduler)
    scheduler.add(third)
    batch = scheduler.schedule(0.0, only=frozenset({second.seq_id}))
    assert shares(batch) == [(2, 2, 1)]
    scheduler.abandon(batch)
    nobody = scheduler.schedule(0.0, only=frozenset({SequenceId(9)}))
    assert nobody.items == ()
    scheduler.abandon(nobody)
    scheduler.check_integrity()
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    assert shares(scheduler.schedule(0.0)) == [(1, 5, 1), (2, 2, 1), (3, 0, 3)]


def test_who_stands_before_the_few_gets_its_blocks_without_being_computed() -> None:
    """So that the order of arrival is kept, on which preemption relies."""
    scheduler = make()
    first, second, third = sequence(1, 5), sequence(2, 2), sequence(3, 3)
    added(scheduler, first, second, third)
    batch = scheduler.schedule(0.0, only=frozenset({second.seq_id}))
    assert shares(batch) == [(2, 0, 2)]
    assert (first.status, third.status) == (SequenceStatus.RUNNING, SequenceStatus.RUNNING)
    scheduler.postprocess(batch, {second.seq_id: [7]})
    scheduler.check_integrity()
    assert shares(scheduler.schedule(0.0)) == [(2, 2, 1), (1, 0, 5), (3, 0, 2)]


def test_starting_over_needs_nothing_but_the_sequences() -> None:
    """Whatever a half-written step left behind, the tokens are the same in the end."""
    scheduler, model = make(num_blocks=20), PagedFakeModel(20, 4)
    everybody = [sequence(i, 3 + i, max_tokens=12, stop=[EOS]) for i in range(6)]
    added(scheduler, *everybody)
    for _ in range(6):
        batch = scheduler.schedule(0.0)
        model.write(batch)
        scheduler.postprocess(batch, model.sample(batch))
    gone = [one for one in everybody if one.is_finished]
    scheduler.cancel(everybody[-1].seq_id)
    left = [one for one in everybody if not one.is_finished]
    assert left
    scheduler.schedule(0.0)
    scheduler.blocks.allocate(1)  # lost
    left[0].block_table.append(left[0].block_table[0])  # held twice
    left[0].status, left[0].finish_reason = SequenceStatus.FINISHED, FinishReason.LENGTH  # ended, but nobody heard
    scheduler.start_over(reversed(left))
    scheduler.check_integrity()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.blocks.num_free) == (0, len(left), 20)
    while scheduler.num_running + scheduler.num_waiting:
        batch = scheduler.schedule(0.0)
        model.write(batch)
        scheduler.postprocess(batch, model.sample(batch))
        scheduler.check_integrity()
    assert [s.output_ids for s in (*gone, *left)] == [expected_output(s, 1000) for s in (*gone, *left)]


def test_deadlines_are_listed_and_removed_wherever_the_sequence_is() -> None:
    scheduler = make(max_num_seqs=1)
    running, waiting, patient = sequence(1, 2, deadline_s=5.0), sequence(2, 2, deadline_s=5.0), sequence(3, 2)
    added(scheduler, running, waiting, patient)
    step(scheduler, now_s=4.9)
    batch = scheduler.schedule(5.0)
    assert batch.expired == (running, waiting)
    assert {running.finish_reason, waiting.finish_reason} == {FinishReason.EXPIRED}
    assert shares(batch) == [(3, 0, 2)]
    scheduler.check_integrity()


def test_a_deadline_in_the_middle_of_a_step_lends_its_blocks_to_nobody() -> None:
    scheduler = make()
    late = sequence(1, 5, deadline_s=5.0)
    scheduler.add(late)
    batch = scheduler.schedule(0.0)
    assert scheduler.expire(6.0) == (late,)
    assert scheduler.expire(6.0) == ()
    assert scheduler.blocks.num_free == 14
    scheduler.postprocess(batch, {})
    assert scheduler.blocks.num_free == 16


def test_the_latest_arrival_makes_room_and_recomputes_with_its_output() -> None:
    scheduler = make(num_blocks=4)
    first, second = sequence(1, 4, max_tokens=8), sequence(2, 4, max_tokens=8)
    added(scheduler, first, second)
    preempted = []
    history = []
    for _ in range(40):
        batch = scheduler.schedule(0.0)
        history.append(shares(batch))
        preempted += [s.seq_id for s in batch.preempted]
        scheduler.postprocess(batch, {i.sequence.seq_id: [7] for i in batch.items if i.needs_token})
        scheduler.check_integrity()
    assert preempted == [2]
    assert (second.num_preemptions, scheduler.counters.preemptions) == (1, 1)
    resumed = [share for shares_ in history for share in shares_ if share[:2] == (2, 0)]
    assert resumed == [(2, 0, 4), (2, 0, 8)], "prompt and output are computed in one go"
    assert len(first.output_ids) == len(second.output_ids) == 8
    assert scheduler.counters.recomputed_tokens > 0
    assert scheduler.counters.prompt_tokens == 8
    assert scheduler.counters.generated_tokens == 16


def test_preemption_changes_no_token() -> None:
    roomy = [sequence(i, 3 + i, max_tokens=12, stop=[EOS]) for i in range(4)]
    tight = [sequence(i, 3 + i, max_tokens=12, stop=[EOS]) for i in range(4)]
    for num_blocks, sequences in ((100, roomy), (6, tight)):
        scheduler, model = make(num_blocks=num_blocks), PagedFakeModel(num_blocks, 4)
        added(scheduler, *sequences)
        while scheduler.num_running + scheduler.num_waiting:
            batch = scheduler.schedule(0.0)
            model.write(batch)
            scheduler.postprocess(batch, model.sample(batch))
            scheduler.check_integrity()
        assert (scheduler.counters.preemptions > 0) == (num_blocks == 6)
    assert [s.output_ids for s in tight] == [s.output_ids for s in roomy]
    assert [s.output_ids for s in roomy] == [expected_output(s, 1000) for s in roomy]


def test_a_preempted_sequence_is_ahead_of_all_that_came_later() -> None:
    scheduler = make(num_blocks=4, max_num_seqs=2)
    second, third = sequence(2, 4, max_tokens=9), sequence(3, 1, max_tokens=1)
    added(scheduler, sequence(1, 4, max_tokens=9), second, third)
    while not second.num_preemptions:
        step(scheduler)
    while second.status is SequenceStatus.WAITING:
        assert third.status is SequenceStatus.WAITING, "there would be room for it"
        assert scheduler.blocks.num_free > 0
        step(scheduler)
    step(scheduler)
    assert third.is_finished


def test_a_big_prompt_at_the_head_is_not_overtaken_for_ever() -> None:
    scheduler = make(num_blocks=6, max_waiting_requests=100)
    added(scheduler, sequence(0, 4, max_tokens=6), sequence(1, 20, max_tokens=2))
    finished: list[int] = []
    for number in range(2, 60):
        scheduler.add(sequence(number, 1, max_tokens=1))
        finished += [u.sequence.seq_id for u in step(scheduler) if u.finish_reason is not None]
    assert finished.index(1) < finished.index(2), "the small ones wait behind it"
    assert finished[:2] == [0, 1]


def test_admission_keeps_a_block_for_everyone_who_may_still_grow() -> None:
    scheduler = make(num_blocks=3)
    added(scheduler, sequence(1, 4, max_tokens=5), sequence(2, 8, max_tokens=1))
    step(scheduler)
    step(scheduler)
    assert scheduler.num_running == 1, "two blocks are free, but the first needs one of them soon"
    updates = [update for _ in range(8) for update in step(scheduler)]
    assert [u.sequence.seq_id for u in updates if u.finish_reason] == [1, 2]
    assert scheduler.counters.preemptions == 0


def test_prompt_scores_are_asked_for_once_in_chunks() -> None:
    scheduler = make()
    scored = sequence(1, 12, max_tokens=0, wants_prompt_logprobs=True)
    added(scheduler, scored, sequence(2, 1, max_tokens=1))
    batch = scheduler.schedule(0.0)
    assert [(i.prompt_rows, i.needs_token) for i in batch.items] == [(range(8), False)]
    assert scheduler.postprocess(batch, {}) == []
    batch = scheduler.schedule(0.0)
    assert batch.items[0].prompt_rows == range(3), "the last row would score what nobody gave"
    assert batch.items[1].prompt_rows == range(0)
    assert [item.needs_token for item in batch.items] == [False, True]
    updates = scheduler.postprocess(batch, {SequenceId(2): [3]})
    assert updates[0] == SequenceUpdate(sequence=scored, tokens=(), finish_reason=FinishReason.LENGTH)
    assert scored.output_ids == []


def test_a_one_token_prompt_has_nothing_to_score() -> None:
    scheduler = make()
    scheduler.add(sequence(1, 1, max_tokens=0, wants_prompt_logprobs=True))
    batch = scheduler.schedule(0.0)
    assert batch.items[0].prompt_rows == range(0)
    assert scheduler.postprocess(batch, {})[0].finish_reason is FinishReason.LENGTH


def test_a_recomputed_prompt_is_not_scored_again() -> None:
    scheduler = make(num_blocks=4)
    added(scheduler, sequence(1, 4, max_tokens=8), sequence(2, 4, max_tokens=8, wants_prompt_logprobs=True))
    scored: list[int] = []
    while scheduler.num_running + scheduler.num_waiting:
        batch = scheduler.schedule(0.0)
        for item in batch.items:
            scored += [item.start + row + 1 for row in item.prompt_rows]
        scheduler.postprocess(batch, {i.sequence.seq_id: [7] for i in batch.items if i.needs_token})
    assert scheduler.counters.preemptions == 1
    assert scored == [1, 2, 3]


def test_status_follows_the_sequence() -> None:
    scheduler = make()
    followed = sequence(1, 2, max_tokens=1)
    history = [followed.status]
    scheduler.add(followed)
    batch = scheduler.schedule(0.0)
    history.append(followed.status)
    scheduler.postprocess(batch, {SequenceId(1): [1]})
    history.append(followed.status)
    assert history == [SequenceStatus.WAITING, SequenceStatus.RUNNING, SequenceStatus.FINISHED]
    assert followed.block_table == []


def test_integrity_notices_a_lost_block() -> None:
    scheduler = make()
    lost = sequence(1, 6)
    scheduler.add(lost)
    step(scheduler)
    lost.block_table.pop()
    with pytest.raises(AssertionError, match="has 0 owners"):
        scheduler.check_integrity()


@pytest.mark.parametrize("name", SchedulerConfig.__slots__)
def test_every_limit_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is 0, but must be at least 1"):
        make(**{name: 0})


def test_a_step_must_hold_one_token_of_everyone_who_runs() -> None:
    with pytest.raises(ValueError, match=r"max_num_batched_tokens is 8.*max_num_seqs \(9\)"):
        make(max_num_seqs=9)
