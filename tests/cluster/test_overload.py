"""Ten times the load for a minute: as much work is done as ever, nobody waits long, and afterwards all is as before."""

from collections.abc import Sequence

import pytest

from cluster.ids import SequenceId
from cluster.scheduler import QueueFull, Scheduler, SchedulerConfig
from cluster.sequence import Sequence as Tokens
from tests.support.load_model import LoadModel, load_model

# A machine on which prompts cost most, one with few places, a fast one, a tiny one.
MACHINES = [
    {},
    {"max_num_seqs": 16},
    {"step_s": 0.01, "token_s": 0.001, "output": 30},
    {"max_num_seqs": 4, "step_s": 0.002, "token_s": 0.0003, "output": 20, "prompt": 40},
]
SPIKE = (60.0, 120.0)


def peak(machine: dict[str, float]) -> float:
    """Answers per second when there is always more to do."""
    made = load_model(**machine, max_queue_wait_s=None)  # type: ignore[arg-type]
    made.run(150, lambda _: 60.0)
    return made.goodput(60, 150)


def spiked(machine: dict[str, float], most: float, **more: float | None) -> LoadModel:
    """Half of the load it can bear for a minute, ten times as much as that for another, then four fifths."""
    made = load_model(**machine, **more)  # type: ignore[arg-type]
    for until_s, load in ((SPIKE[0], 0.5), (SPIKE[1], 10.0), (200.0, 0.8)):
        made.run(until_s, lambda _, load=load: load * most)
    return made


def middle(values: Sequence[float]) -> float:
    return values[len(values) // 2]


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_a_spike_costs_no_throughput_and_is_over_when_it_is_over(machine: dict[str, float]) -> None:
    most = peak(machine)
    bounded = spiked(machine, most)
    unbounded = spiked(machine, most, max_queue_wait_s=None)
    assert bounded.goodput(*SPIKE) >= 0.9 * unbounded.goodput(*SPIKE)
    before = middle(bounded.first_token_s(20, SPIKE[0]))
    lasting = middle(bounded.first_token_s(SPIKE[0] + 30, SPIKE[1]))
    after = middle(bounded.first_token_s(SPIKE[1] + 10, 200))
    assert lasting <= before + 4, "while it lasts"
    assert after <= max(2 * before, before + 0.5), "ten seconds later"
    assert max(count for at_s, count in bounded.waiting if at_s > SPIKE[1] + 10) <= 20
    assert bounded.first_token_s(*SPIKE)[-1] <= 30, "nobody ever waits for minutes"
    assert middle(unbounded.first_token_s(*SPIKE)) > middle(bounded.first_token_s(*SPIKE))


def test_a_burst_that_passes_is_taken_in() -> None:
    made = load_model(step_s=0.01, token_s=0.001, output=30)
    made.run(40, lambda _: 5.0)
    made.run(43, lambda _: 30.0)
    assert len(made.refused_s) == 0
    made.run(60, lambda _: 3.0)
    assert len(made.done_s) >= len(made.arrived_s) - 20


def scheduler(**changes: float | None) -> Scheduler:
    limits = {
        "max_num_seqs": 2,
        "max_num_batched_tokens": 8,
        "block_size": 4,
        "max_waiting_requests": 100,
        "max_waiting_tokens": 1000,
        "max_model_len": 100,
        "max_queue_wait_s": 10.0,
    }
    return Scheduler(SchedulerConfig(**{**limits, **changes}), 64)  # type: ignore[arg-type]


def newcomer(number: int, **more: float | None) -> Tokens:
    return Tokens(seq_id=SequenceId(number), prompt_ids=[7] * 2, max_tokens=4, **more)  # type: ignore[arg-type]


def crowd_in(made: Scheduler, count: int) -> None:
    for number in range(count):
        made.add(newcomer(number))


def resumed(number: int) -> Tokens:
    """It was promised an answer elsewhere, where it got its first token."""
    made = Tokens(seq_id=SequenceId(number), prompt_ids=[7] * 2, max_tokens=5)
    made.output_ids.append(8)
    return made


def slow(made: Scheduler, *, seconds_per_step: float, steps: int) -> float:
    """Two run and two wait, always; a step takes its time. Returns what time it is then."""
    for number in range(steps + 1):
        while made.num_running + made.num_waiting < 4:
            made.add(resumed(1000 + 10 * number + made.num_waiting))
        batch = made.schedule(number * seconds_per_step)
        if number < steps:
            made.postprocess(batch, {i.sequence.seq_id: [9] for i in batch.items if i.needs_token})
    made.abandon(batch)
    return steps * seconds_per_step


def test_the_refusal_says_how_long_it_would_be_and_when_to_come_back() -> None:
    made = scheduler()
    slow(made, seconds_per_step=1.0, steps=8)  # two sequences of four steps at a time: one starts every two seconds
    with pytest.raises(QueueFull) as full:
        crowd_in(made, 50)
    assert "more would start in about" in str(full.value)
    assert "max_queue_wait_s is 10" in str(full.value)
    assert 1 <= full.value.retry_after_s <= 3
    assert 3 <= made.num_waiting <= 8
    made.check_integrity()


def test_a_load_that_lasts_gets_a_tenth_of_the_wait() -> None:
    made = scheduler()
    slow(made, seconds_per_step=1.0, steps=24)
    with pytest.raises(QueueFull, match="1 s are granted"):
        made.add(newcomer(1))


def test_who_could_not_be_done_in_time_is_refused_at_once() -> None:
    made = scheduler()
    now_s = slow(made, seconds_per_step=1.0, steps=8)
    with pytest.raises(QueueFull, match="after its deadline"):
        made.add(newcomer(1, deadline_s=now_s + 2))
    made.add(newcomer(2, deadline_s=now_s + 60))


def test_who_was_promised_an_answer_elsewhere_is_taken() -> None:
    made = scheduler()
    slow(made, seconds_per_step=1.0, steps=24)
    made.add(resumed(1))
    with pytest.raises(QueueFull):
        made.add(newcomer(2))


@pytest.mark.parametrize("wait_s", [0, -1.0])
def test_the_wait_must_be_positive(wait_s: float) -> None:
    with pytest.raises(ValueError, match="max_queue_wait_s is"):
        scheduler(max_queue_wait_s=wait_s)
