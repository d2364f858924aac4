"""The waiting queue: order, bounds, and an honest word on when to come back."""

import pytest

from cluster.ids import SequenceId
from cluster.queue_pace import RATE_WINDOW_S
from cluster.sequence import Sequence
from cluster.waiting_queue import MAX_RETRY_S, MIN_RETRY_S, QueueFull, WaitingQueue


def sequence(number: int, length: int = 1) -> Sequence:
    made = Sequence(seq_id=SequenceId(number), prompt_ids=[0] * length, max_tokens=1)
    made.arrival = number
    return made


def filled(count: int, length: int = 1, max_requests: int = 10, max_tokens: int = 1000) -> WaitingQueue:
    queue = WaitingQueue(max_requests, max_tokens)
    for number in range(count):
        queue.push(sequence(number, length))
    return queue


def refusal(queue: WaitingQueue, length: int = 1) -> QueueFull:
    with pytest.raises(QueueFull) as caught:
        queue.push(sequence(999, length))
    return caught.value


def test_first_come_first_served() -> None:
    queue = filled(3, length=2)
    assert (len(queue), queue.num_tokens) == (3, 6)
    assert queue.head() is not None
    assert [queue.pop().seq_id for _ in range(3)] == [0, 1, 2]
    assert (queue.head(), queue.num_tokens, list(queue)) == (None, 0, [])


def test_a_preempted_sequence_comes_back_first_whatever_the_bounds() -> None:
    queue = filled(3, max_requests=3)
    first = queue.pop()
    queue.push(sequence(3))
    first.output_ids += [1, 2, 3]
    queue.push_front(first)
    assert [s.seq_id for s in queue] == [0, 1, 2, 3]
    assert queue.num_tokens == 3 + 4


def test_nobody_overtakes_by_coming_back() -> None:
    queue = filled(2)
    with pytest.raises(AssertionError):
        queue.push_front(sequence(5))


def test_removal_gives_the_place_away() -> None:
    queue = filled(3, length=4)
    queue.remove(list(queue)[1])
    assert [s.seq_id for s in queue] == [0, 2]
    assert queue.num_tokens == 8


def test_a_full_queue_says_which_limit() -> None:
    assert "3 requests are waiting; max_waiting_requests is 3" in str(refusal(filled(3, max_requests=3)))
    full = refusal(filled(2, length=4, max_tokens=10), length=3)
    assert "8 tokens are waiting and 3 more are asked for; max_waiting_tokens is 10" in str(full)


def test_what_goes_on_from_elsewhere_may_fill_as_much_again_and_no_more() -> None:
    queue = filled(3, length=3, max_requests=3, max_tokens=9)

    def going_on(number: int, generated: int) -> Sequence:
        return Sequence(seq_id=SequenceId(number), prompt_ids=[0], max_tokens=99, generated_ids=[7] * generated)

    refusal(queue)
    for number in (10, 11):
        queue.push(going_on(number, 2))
    with pytest.raises(QueueFull, match="15 tokens are waiting and 5 more"):
        queue.push(going_on(12, 4))
    queue.push(going_on(12, 2))
    assert (len(queue), queue.num_tokens) == (6, 18)
    with pytest.raises(QueueFull, match="6 requests are waiting; max_waiting_requests is 3"):
        queue.push(going_on(13, 1))
    refusal(queue)


def test_an_empty_queue_takes_what_goes_on_however_long_it_has_become() -> None:
    queue = WaitingQueue(3, 9)
    queue.push(Sequence(seq_id=SequenceId(1), prompt_ids=[0] * 9, max_tokens=99, generated_ids=[7] * 40))
    assert queue.num_tokens == 49
    refusal(queue)


def test_without_a_past_the_wait_is_the_least() -> None:
    queue = filled(3, max_requests=3)
    assert refusal(queue).retry_after_s == MIN_RETRY_S
    queue.observe(100.0)
    assert refusal(queue).retry_after_s == MIN_RETRY_S


def test_the_wait_follows_the_rate_of_requests() -> None:
    queue = filled(10)
    queue.observe(0.0)
    queue.pop()
    queue.push(sequence(10))
    queue.observe(5.0)
    assert refusal(queue).retry_after_s == pytest.approx(5.0), "one place in five seconds"
    for number in range(11, 15):
        queue.pop()
        queue.push(sequence(number))
    queue.observe(10.0)
    assert refusal(queue).retry_after_s == pytest.approx(2.0), "five places in ten seconds"


def test_the_wait_follows_the_rate_of_tokens() -> None:
    queue = filled(3, length=100, max_tokens=300)
    queue.observe(0.0)
    queue.pop()
    queue.push(sequence(3, 100))
    queue.observe(10.0)
    assert refusal(queue, length=50).retry_after_s == pytest.approx(5.0), "50 tokens at 10 a second"
    assert refusal(queue, length=200).retry_after_s == pytest.approx(20.0)


def test_a_queue_that_stands_still_asks_for_the_longest_wait() -> None:
    queue = filled(3, max_requests=3)
    queue.observe(0.0)
    queue.observe(20.0)
    assert refusal(queue).retry_after_s == MAX_RETRY_S


def test_old_admissions_do_not_count() -> None:
    queue = filled(10)
    queue.observe(0.0)
    for number in range(10, 20):
        queue.pop()
        queue.push(sequence(number))
    queue.observe(RATE_WINDOW_S)
    assert refusal(queue).retry_after_s == pytest.approx(3.0)
    queue.observe(2 * RATE_WINDOW_S + 1)
    assert refusal(queue).retry_after_s == MAX_RETRY_S


def test_idle_time_does_not_slow_the_rate() -> None:
    queue = WaitingQueue(2, 1000)
    queue.observe(0.0)
    for number in range(2):
        queue.push(sequence(number))
    queue.observe(1000.0)
    queue.pop()
    queue.push(sequence(2))
    queue.observe(1002.0)
    assert refusal(queue).retry_after_s == pytest.approx(2.0)


def test_a_resumed_sequence_is_no_sign_of_progress() -> None:
    queue = filled(2, max_requests=2)
    queue.observe(0.0)
    again = queue.pop()
    again.num_preemptions = 1
    queue.push_front(again)
    for _ in range(5):
        queue.observe(1.0)
        queue.push_front(queue.pop())
    queue.observe(10.0)
    assert refusal(queue).retry_after_s == pytest.approx(10.0), "one admission in ten seconds, not six"


def test_memory_for_the_rate_is_bounded() -> None:
    queue = filled(1, max_requests=1)
    queue.observe(0.0)
    for number in range(1, 3001):
        queue.observe(number / 1000)
        queue.push_front(queue.pop())
    queue.observe(3.0)
    assert refusal(queue).retry_after_s == MIN_RETRY_S
