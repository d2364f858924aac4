"""Whose turn it is: shares in tokens, no turns saved up, nobody overtaken for ever, priorities inside a tenant only."""

import random
from collections import Counter
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import fair_queue
from cluster.fair_queue import OUTPUT_WEIGHT, FairQueue
from cluster.ids import SequenceId
from cluster.scheduler import QueueFull, Scheduler, SchedulerConfig
from cluster.sequence import FinishReason, Sequence
from cluster.waiting_queue import WaitingQueue

_NUMBERS = count()


def sequence(tenant: str, prompt: int = 1, *, priority: int = 0, output: int = 1) -> Sequence:
    number = next(_NUMBERS)
    made = Sequence(
        seq_id=SequenceId(number), prompt_ids=[0] * prompt, max_tokens=output, tenant=tenant, priority=priority
    )
    made.arrival = number
    return made


def waiting(*lines: tuple[str, int], prompt: int = 1) -> FairQueue:
    queue = FairQueue()
    for tenant, number in lines:
        for _ in range(number):
            queue.add(sequence(tenant, prompt))
    return queue


def served(queue: FairQueue, most: int = 10**6) -> list[str]:
    return [queue.pop().tenant for _ in range(min(most, len(queue)))]


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    queue = FairQueue()
    made = [sequence("a", length) for length in (5, 1, 9, 2)]
    for one in made:
        queue.add(one)
    assert list(queue) == made
    assert (len(queue), queue.num_tokens, queue.num_tenants) == (4, 17, 1)
    assert [queue.pop() for _ in made] == made
    assert (len(queue), queue.num_tokens, queue.num_tenants, queue.head()) == (0, 0, 0, None)


def test_tenants_take_turns_by_tokens_not_by_requests() -> None:
    assert served(waiting(("a", 1000), ("b", 3)), 6) == ["a", "b", "a", "b", "a", "b"]
    queue = FairQueue()
    for _ in range(8):
        queue.add(sequence("long", 30))
        queue.add(sequence("short", 10))
    assert Counter(served(queue, 8)) == {"long": 2, "short": 6}


def test_output_counts_while_somebody_waits() -> None:
    queue = waiting(("a", 10), ("b", 10))
    queue.note_output("a", 5)
    assert served(queue, 12) == ["b"] * 10 + ["a"] * 2, "10 tokens of b stand against 5 of output"
    assert OUTPUT_WEIGHT == 2
    idle = FairQueue()
    idle.note_output("a", 1000)
    for tenant in ("a", "b"):
        idle.add(sequence(tenant))
    assert served(idle) == ["a", "b"], "nobody waited: nothing was taken from anybody"


def test_nobody_saves_up_turns() -> None:
    queue = waiting(("a", 100))
    served(queue, 50)
    for _ in range(50):
        queue.add(sequence("b"))
    assert served(queue, 3) in (["a", "b", "a"], ["b", "a", "b"])
    queue = waiting(("a", 50))
    served(queue)
    for tenant in ("b", "a"):
        for _ in range(20):
            queue.add(sequence(tenant))
    assert Counter(served(queue, 20)) == {"a": 10, "b": 10}, "an empty queue in between changes nothing"


def test_a_head_stays_head_until_it_is_served_or_gone() -> None:
    """Who needs much room must not be overtaken because its tenant's others go on running."""
    queue = waiting(("a", 2), ("b", 2))
    head = queue.head()
    assert head is not None
    queue.note_output(head.tenant, 1000)
    assert queue.head() is head
    queue.add(sequence(head.tenant, priority=-5))
    assert queue.head() is head
    queue.remove(head)
    assert queue.head() is not head


def test_priority_counts_inside_a_tenant_only() -> None:
    queue = FairQueue()
    made = [sequence("a", priority=priority) for priority in (5, 0, -3, 0, 5)]
    for one in made:
        queue.add(one)
    assert [queue.pop() for _ in made] == [made[2], made[1], made[3], made[0], made[4]]
    for number in range(6):
        queue.add(sequence("urgent", priority=-1000))
        queue.add(sequence("patient", priority=number))
    assert Counter(served(queue, 6)) == {"urgent": 3, "patient": 3}


def test_the_estimate_of_who_is_before_a_newcomer() -> None:
    queue = waiting(("a", 1000), ("b", 3), prompt=10)
    assert queue.ahead_of(sequence("c", 20)) == (2, 40), "one of each, and as many tokens as it has itself of each"
    assert queue.ahead_of(sequence("b", 10)) == (3 + 4, 30 + 40)
    assert queue.ahead_of(sequence("a", 10)) == (1003, 10_030)


def test_memory_of_who_was_served_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "MAX_TENANTS", 8)
    queue = waiting(("old", 500))
    for number in range(200):
        queue.add(sequence(f"t{number}"))
        served(queue, 3)
    assert len(queue._served) <= 8 + queue.num_tenants + 1
    assert "old" in queue._served


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_shares_of_those_that_always_wait_are_equal(seed: int) -> None:
    """Whatever lengths they ask for: the difference is bounded by the largest requests (the paper's theorem 4.4)."""
    rng = random.Random(seed)
    tenants = [f"t{number}" for number in range(rng.randint(2, 5))]
    longest = {tenant: (rng.randint(1, 60), rng.randint(1, 20)) for tenant in tenants}
    queue, got = FairQueue(), Counter[str]()
    running: list[list[object]] = []

    def ask(tenant: str) -> Sequence:
        prompt, output = longest[tenant]
        return sequence(tenant, rng.randint(1, prompt), output=rng.randint(1, output))

    for tenant in tenants:
        for _ in range(30):
            queue.add(ask(tenant))
    slots = rng.randint(1, 6)
    for _ in range(1500):
        while len(running) < slots:
            one = queue.pop()
            got[one.tenant] += one.num_tokens
            running.append([one, one.max_tokens])
            queue.add(ask(one.tenant))
        for item in running:
            one, item[1] = item[0], int(str(item[1])) - 1
            assert isinstance(one, Sequence)
            got[one.tenant] += OUTPUT_WEIGHT
            queue.note_output(one.tenant, 1)
        running = [item for item in running if int(str(item[1])) > 0]
    most = max(prompt + OUTPUT_WEIGHT * output * slots for prompt, output in longest.values())
    assert max(got.values()) - min(got.values()) <= 2 * most


# ---- with the scheduler: bounds, room, and no waiting for ever ---------------------------------------------


def scheduler(**changes: int) -> Scheduler:
    limits = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "max_waiting_requests": 1000,
        "max_waiting_tokens": 100_000,
        "max_model_len": 200,
    }
    return Scheduler(SchedulerConfig(**{**limits, **changes}), 128)


def step(made: Scheduler, at: float) -> list[Sequence]:
    """Computes one step; returns who ended."""
    batch = made.schedule(at)
    updates = made.postprocess(batch, {i.sequence.seq_id: [9] for i in batch.items if i.needs_token})
    made.check_integrity()
    return [one.sequence for one in updates if one.finish_reason is not None]


def test_a_thousand_queued_requests_do_not_delay_another_tenants_first() -> None:
    made = scheduler()
    for _ in range(1000):
        made.add(sequence("many", 8, output=10))
    for at in range(5):
        step(made, at)
    one = sequence("one", 8, output=10)
    made.add(one)
    steps = 0
    while not one.is_finished:
        step(made, 5 + steps)
        steps += 1
    assert steps <= 2 * 10 + 2, "one place becomes free within ten steps, and it takes ten"


def test_two_tenants_get_the_same_however_many_they_ask_for() -> None:
    made = scheduler()
    for _ in range(900):
        made.add(sequence("many", 8, output=10))
    done = Counter[str]()
    for at in range(400):
        while sum(one.tenant == "few" for one in made._waiting) < 2:
            made.add(sequence("few", 8, output=10))
        done.update(one.tenant for one in step(made, at))
    assert done["few"] == pytest.approx(done["many"], abs=6)
    assert done["few"] + done["many"] >= 400 / 10 * 4 - 8, "no place stays empty"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_whatever_happens_everybody_is_served(seed: int) -> None:
    """Random tenants, priorities, lengths, cancellations, preemptions, lost books; a step always advances someone."""
    rng = random.Random(seed)
    made = scheduler(max_num_seqs=rng.randint(1, 5), max_waiting_requests=20)
    made.blocks = type(made.blocks)(rng.randint(50, 60))
    alive: list[Sequence] = []
    for at in range(rng.randint(20, 120)):
        for _ in range(rng.randint(0, 4)):
            one = sequence(
                rng.choice("aaaab"), rng.randint(1, 90), priority=rng.randint(-1, 1), output=rng.randint(1, 99)
            )
            try:
                displaced = made.add(one)
            except QueueFull:
                continue
            assert all(gone.finish_reason is FinishReason.ERROR and gone.tenant != one.tenant for gone in displaced)
            alive.append(one)
        if alive and rng.random() < 0.2:
            made.cancel(rng.choice(alive).seq_id)
        if rng.random() < 0.03:
            made.start_over([one for one in alive if not one.is_finished])
        step(made, at)
    for at in range(20_000):
        if not made.num_running + made.num_waiting:
            break
        step(made, 1000 + at)
    assert all(one.is_finished for one in alive)
    assert (made.num_waiting, made.num_waiting_tokens, made.num_waiting_tenants) == (0, 0, 0)


def full(most: int = 10, **more: int) -> WaitingQueue:
    queue = WaitingQueue(most, 1000)
    for tenant, number in more.items():
        for _ in range(number):
            queue.push(sequence(tenant, 10))
    return queue


def test_a_full_queue_refuses_the_tenant_that_has_most() -> None:
    queue = full(a=8, b=2)
    last_of_a = [one for one in queue if one.tenant == "a"][-1]
    assert queue.push(sequence("c", 10)) == (last_of_a,)
    assert len(queue) == 10
    for tenant in ("b", "c", "b", "c"):
        assert [one.tenant for one in queue.push(sequence(tenant, 10))] == ["a"]
    assert Counter(one.tenant for one in queue) == {"a": 3, "b": 4, "c": 3}
    with pytest.raises(QueueFull, match="10 requests are waiting; max_waiting_requests is 10"):
        queue.push(sequence("a", 10))
    with pytest.raises(QueueFull):
        queue.push(sequence("b", 10))


def test_a_full_queue_makes_room_by_tokens_too() -> None:
    queue = WaitingQueue(100, 100)
    for _ in range(9):
        queue.push(sequence("a", 10))
    assert queue.push(sequence("b", 10)) == ()
    assert [one.tenant for one in queue.push(sequence("b", 20))] == ["a", "a"]
    assert queue.num_tokens == 100
    with pytest.raises(QueueFull, match="100 tokens are waiting and 50 more are asked for"):
        queue.push(sequence("b", 50))
    assert queue.num_tokens == 100, "nobody leaves for one that does not fit"


def test_nobody_leaves_who_was_promised_an_answer() -> None:
    queue = WaitingQueue(3, 1000)
    for number in range(3):
        one = sequence("a", 5, output=9)
        if number:
            one.output_ids.append(7)
        queue.push(one)
    (gone,) = queue.push(sequence("b", 5))
    assert not gone.output_ids
    with pytest.raises(QueueFull):
        queue.push(sequence("c", 5))


def test_within_a_priority_the_latest_leaves_and_the_lowest_first() -> None:
    queue = WaitingQueue(3, 1000)
    made = [sequence("a", priority=priority) for priority in (3, 0, 0)]
    for one in made:
        queue.push(one)
    assert queue.push(sequence("b")) == (made[0],)


def test_a_long_line_is_no_wait_for_another_tenant() -> None:
    """The bound in time looks at who would really be served before."""
    made = scheduler(max_num_seqs=2, max_queue_wait_s=10)
    for _ in range(4):
        made.add(sequence("many", 2, output=4))

    def crowd_in() -> None:
        for at in range(1000):
            made.add(sequence("many", 2, output=4))
            if made.num_waiting > 4:
                step(made, at)  # a second each

    with pytest.raises(QueueFull, match="one more would start in about"):
        crowd_in()
    before = made.num_waiting
    made.add(sequence("one", 2, output=4))
    assert made.num_waiting == before + 1
