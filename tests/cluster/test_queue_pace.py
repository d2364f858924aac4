"""How long a newcomer would wait: from what was seen, and with care where little was."""

import math

import pytest

from cluster.queue_pace import MAX_STRAIN_S, PlannedStep, QueuePace

STEP_TOKENS = 100


def planned(num_running: int = 0, num_waiting: int = 0, **more: int) -> PlannedStep:
    facts = {"num_tokens": num_running, "num_starting": 0, "backlog": 0, **more}
    return PlannedStep(num_running=num_running, num_waiting=num_waiting, **facts)


def pace(slots: int = 8) -> QueuePace:
    return QueuePace(slots, STEP_TOKENS)


def steady(made: QueuePace, *, seconds: float, per_s: float, num_running: int, run_s: float, at_s: float = 0.0) -> None:
    """Sequences start and end at a rate, each having run for `run_s`."""
    for count in range(int(seconds * per_s)):
        made.observe(at_s + count / per_s)
        made.note_end(made.now_s - run_s)
        made.note_admitted(10)
        made.note_plan(planned(num_running, num_waiting=1))
    made.observe(at_s + seconds)


def test_who_finds_a_place_does_not_wait() -> None:
    made = pace(slots=8)
    assert made.start_wait_s(7, 0) == 0, "an engine that has not run yet has all its places"
    made.note_plan(planned(num_running=5))
    assert made.start_wait_s(2, 0) == 0, "three places are free"
    made.note_plan(planned(num_running=8))
    assert made.start_wait_s(0, 0) == 0, "the first in the queue starts when anybody ends"


def test_before_anything_is_known_as_many_may_wait_as_can_run() -> None:
    made = pace(slots=8)
    made.note_plan(planned(num_running=8, num_waiting=1))
    assert made.start_wait_s(7, 0) == 0
    assert made.start_wait_s(8, 0) == math.inf


def test_places_are_not_counted_while_somebody_found_none() -> None:
    """KV blocks may be what lacks."""
    made = pace(slots=8)
    steady(made, seconds=20, per_s=1, num_running=3, run_s=3)
    assert made.start_wait_s(4, 0) == pytest.approx(5, rel=0.1)


def test_prompts_that_are_mostly_found_in_the_cache_are_waited_for_less() -> None:
    waits = []
    for num_cached in (0, 80):
        made = pace()
        for count in range(40):
            made.observe(float(count))
            made.note_admitted(100, num_cached)
            made.note_plan(planned(1, num_tokens=STEP_TOKENS))
        made.note_plan(planned(1, num_starting=4))
        waits.append(made.start_wait_s(3, 1000))
    assert waits == pytest.approx([10.0, 2.0], rel=0.1)


def test_the_wait_follows_the_rate_at_which_sequences_start() -> None:
    made = pace()
    steady(made, seconds=30, per_s=2, num_running=8, run_s=4)
    assert made.rate() == pytest.approx(2, rel=0.05)
    assert made.start_wait_s(9, 0) == pytest.approx(5, rel=0.05)


def test_at_the_start_of_a_rush_the_past_counts() -> None:
    """Alone a sequence took two seconds; eight side by side are guessed to give the root of eight as many a second."""
    made = pace(slots=8)
    for second in range(20):
        made.observe(float(second))
        made.note_plan(planned(num_running=1))
        made.note_end(made.now_s - 2)
    made.restart()
    made.observe(20.0)
    made.note_plan(planned(num_running=8, num_waiting=1))
    assert made.rate() == pytest.approx(math.sqrt(8) / 2, rel=0.01)
    made.observe(30.0)
    assert made.rate() == pytest.approx(math.sqrt(8) / 2 * 2 / 12, rel=0.01), "ten seconds without a start count more"


def test_prompts_before_it_are_waited_for_too() -> None:
    made = pace()
    for now_s in range(5):
        made.observe(now_s / 2)
        made.note_plan(planned(num_running=4, num_tokens=80, num_starting=4, backlog=500))
    made.observe(2.5)
    assert made.start_wait_s(0, 0) == pytest.approx(500 / 160)
    assert made.start_wait_s(0, 300) == pytest.approx(800 / 160), "and those that wait"


def test_a_few_prompts_are_not_weighed_and_neither_are_those_that_fit_into_a_step() -> None:
    made = pace()
    for now_s, num_starting, backlog in ((0, 4, 500), (1, 3, 5000), (2, 4, 100)):
        made.observe(float(now_s))
        made.note_plan(planned(num_running=4, num_tokens=80, num_starting=num_starting, backlog=backlog))
        assert (made.start_wait_s(0, 0) == 0) == (now_s in (0, 1, 2))
    assert made.start_wait_s(0, 1) > 0


def test_small_steps_do_not_tell_how_fast_prompts_are_computed() -> None:
    made = pace()
    for now_s, num_tokens in ((0, 80), (1, 4), (2, 4), (3, 4)):
        made.observe(float(now_s))
        made.note_plan(planned(num_running=4, num_tokens=num_tokens, num_starting=4, backlog=400))
    assert made.start_wait_s(0, 0) == pytest.approx(5)


def test_strain_grows_while_nobody_could_start_and_fades_in_calm() -> None:
    made = pace()
    made.note_plan(planned(num_running=8, num_waiting=1))
    made.observe(5.0)
    assert made.strain_s == 5
    made.note_plan(planned(num_running=8))
    made.observe(7.0)
    assert made.strain_s == 3, "a moment of calm between two rushes does not end the strain"
    made.note_plan(planned(num_running=1, backlog=STEP_TOKENS + 1))
    made.observe(8.0)
    assert made.strain_s == 4
    made.note_plan(planned())
    made.observe(100.0)
    assert made.strain_s == 0
    made.note_plan(planned(num_running=8, num_waiting=1))
    made.observe(1000.0)
    assert made.strain_s == MAX_STRAIN_S
