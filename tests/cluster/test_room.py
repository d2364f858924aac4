"""Whether there is room in the waiting queue: what it would say, without anybody being taken or sent away."""

import contextlib
import random

import pytest

from cluster.ids import SequenceId
from cluster.queue_pace import PlannedStep, QueuePace
from cluster.scheduler import Scheduler, SchedulerConfig
from cluster.sequence import Sequence
from cluster.waiting_queue import MIN_RETRY_S, QueueFull, WaitingQueue

MOST = 50


def sequence(number: int, tokens: int = 1, tenant: str = "") -> Sequence:
    made = Sequence(seq_id=SequenceId(number), prompt_ids=[0] * tokens, max_tokens=1, tenant=tenant)
    made.arrival = number
    return made


def taken(queue: WaitingQueue, tokens: int, tenant: str) -> int:
    """How many come in before one is refused, or somebody must leave for one; the queue is changed."""
    for number in range(MOST):
        try:
            if queue.push(sequence(10_000 + number, tokens, tenant)):
                return number
        except QueueFull:
            return number
    return MOST


def test_as_many_as_the_bound_of_requests_leaves() -> None:
    queue = WaitingQueue(5, 1000)
    queue.push(sequence(0))
    assert queue.room(sequence(1), MOST) == (4, 0.0)
    assert queue.room(sequence(1), 3) == (3, 0.0), "no more are counted than are asked for"
    assert len(queue) == 1


def test_as_many_as_the_bound_of_tokens_leaves() -> None:
    queue = WaitingQueue(5, 100)
    queue.push(sequence(0, 40))
    assert queue.room(sequence(1, 25), MOST) == (2, 0.0)
    assert queue.room(sequence(1, 70), MOST) == (0, MIN_RETRY_S)


def test_a_full_queue_has_room_for_who_has_less_in_it() -> None:
    queue = WaitingQueue(3, 1000)
    for number in range(3):
        queue.push(sequence(number, tenant="much"))
    assert queue.room(sequence(9, tenant="much"), MOST)[0] == 0
    assert queue.room(sequence(9, tenant="little"), MOST)[0] == 1, "in another's place, which is one's for now"
    assert [one.tenant for one in queue] == ["much"] * 3, "nobody had to leave for a question"


@pytest.mark.parametrize("seed", range(40))
def test_the_answer_is_what_pushing_would_find(seed: int) -> None:
    """Whatever waits. Only the first of a kind may be let in in another's place."""
    rng = random.Random(seed)
    pace = QueuePace(rng.randint(1, 8), 64)
    queue = WaitingQueue(rng.randint(1, 30), rng.randint(50, 400), pace, rng.choice([None, 0.5, 3.0, 30.0]))
    now_s = 0.0
    for number in range(rng.randint(0, 60)):
        with contextlib.suppress(QueueFull):
            queue.push(sequence(number, rng.randint(1, 30), rng.choice(["a", "b", "c"])))
        if rng.random() < 0.5:
            now_s += rng.random()
            queue.observe(now_s)
            queue.note_plan(
                PlannedStep(
                    num_tokens=rng.randint(1, 64),
                    num_running=rng.randint(1, 8),
                    num_starting=rng.randint(0, 4),
                    num_waiting=len(queue),
                    backlog=rng.randint(0, 100),
                )
            )
            if len(queue) and rng.random() < 0.7:
                queue.note_end(queue.pop())
    tokens = rng.randint(1, 40)
    before = [one.seq_id for one in queue], queue.num_tokens, pace.strain_s
    said, retry_s = queue.room(sequence(999, tokens, "only"), MOST)
    assert before == ([one.seq_id for one in queue], queue.num_tokens, pace.strain_s)
    assert (retry_s >= MIN_RETRY_S) == (said == 0)
    if len(queue) == 0:
        return  # the first one into an empty queue begins a new count of its pace
    found = taken(queue, tokens, "only")
    assert said == found or (found == 0 and said == 1), f"said {said}, found {found}"


def test_the_scheduler_answers_for_any_length_of_prompt() -> None:
    config = SchedulerConfig(
        max_num_seqs=2,
        max_num_batched_tokens=16,
        block_size=16,
        max_waiting_requests=3,
        max_waiting_tokens=64,
        max_model_len=32,
    )
    scheduler = Scheduler(config, num_blocks=8)
    assert scheduler.room("", 10, MOST) == (3, 0.0)
    assert scheduler.room("", 0, MOST) == (3, 0.0)
    assert scheduler.room("", 1 << 31, MOST) == (2, 0.0), "as long as any that can be served"
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 0)
