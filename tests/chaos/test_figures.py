"""The suite's arithmetic: gaps, wrong tokens, percentiles, recovery, and when a bar is kept."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.figures import (
    Answer,
    Bar,
    Stream,
    Trial,
    answer_of,
    conclude,
    latency_back_s,
    percentile,
    token_rate,
    worst_first_s,
    worst_gap_s,
    wrong_tokens,
)
from tests.chaos.report import json_line


def stream(tokens: list[int], times_s: list[float] | None = None, *, error: str | None = None) -> Stream:
    times_s = [float(place) for place in range(len(tokens))] if times_s is None else times_s
    return Stream(("lane", 0, 0), -1.0, list(tokens), times_s, [], ended_s=times_s[-1] if times_s else 0.0, error=error)


@given(st.lists(st.integers(0, 300), max_size=20))
def test_the_golden_answer_has_no_wrong_token(tokens: list[int]) -> None:
    assert wrong_tokens(stream(tokens), Answer(tuple(tokens))) == 0


@pytest.mark.parametrize(
    ("tokens", "error", "wrong"),
    [
        ([1, 2, 9, 4], None, 1),  # another token
        ([1, 2, 3], None, 1),  # one missing at the end
        ([1, 2, 2, 3, 4], None, 3),  # one said twice: all after it are in the wrong place
        ([2, 3, 4], None, 4),  # one missing in front
        ([1, 2], "cut", 0),  # it failed, and what it said before is right
        ([1, 7], "cut", 1),
        ([1, 2, 3, 4, 5], "cut", 1),  # more than there was to say
    ],
)
def test_wrong_tokens_by_place(tokens: list[int], error: str | None, wrong: int) -> None:
    assert wrong_tokens(stream(tokens, error=error), Answer((1, 2, 3, 4))) == wrong


def test_a_log_probability_that_differs_makes_its_token_wrong() -> None:
    said = stream([1, 2])
    said.logprobs = [-0.5, -0.25]
    assert wrong_tokens(said, answer_of(said)) == 0
    assert wrong_tokens(said, Answer((1, 2), (-0.5, -0.2500001))) == 1


def test_gaps_are_between_tokens_of_one_stream_and_until_a_failure() -> None:
    assert worst_gap_s([stream([1, 2, 3], [0.0, 0.5, 0.6]), stream([1, 2], [5.0, 5.1])]) == 0.5
    cut = stream([1], [1.0], error="cut")
    cut.ended_s = 4.0
    assert worst_gap_s([cut]) == 3.0
    assert worst_gap_s([]) == 0.0
    assert worst_first_s([stream([1], [2.5]), stream([])]) == 3.5


def test_rates_and_recovery() -> None:
    steady = [float(tick) / 10 for tick in range(100)]  # ten a second
    whole = stream(list(range(100)), steady)
    assert token_rate([whole], 0.0, 10.0) == pytest.approx(10.0)
    assert latency_back_s([whole], 10.0, 0.0, 10.0) == 0.0
    late = [at_s for at_s in steady if not 2.0 <= at_s < 6.0]
    paused = stream(list(range(len(late))), late)
    back_s = latency_back_s([paused], 10.0, 2.0, 10.0)
    assert back_s is not None
    assert 5.0 < back_s <= 6.0
    assert latency_back_s([paused], 10.0, 2.0, 6.1) is None  # nobody can know yet
    assert latency_back_s([paused], 100.0, 2.0, 10.0) is None


def test_percentiles_are_of_values_that_were_seen() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99), percentile([3.0, 9.0], 99)) == (50.0, 99.0, 9.0)
    assert percentile([], 50) is None


def test_a_row_that_keeps_its_bar_holds_and_says_so_in_one_line() -> None:
    trials = [Trial(stall_ms=5.0, recover_s=1.0, extra_calls=3, calls=100), Trial(stall_ms=40.0, recover_s=2.5)]
    line = json_line(conclude("F1", Bar(text="stall <= 50 ms", stall_ms=50.0, recover_s=3.0), trials, [], ["fine"]))
    assert "\n" not in line
    assert json.loads(line) == {
        "id": "F1",
        "repeats": 2,
        "failed": 0,
        "wrong_tokens": 0,
        "stall_p50_ms": 5.0,
        "stall_p99_ms": 40.0,
        "recover_s": 2.5,
        "extra_calls_pct": 3.0,
        "bar": "stall <= 50 ms",
        "held": True,
        "note": "fine",
    }


@pytest.mark.parametrize(
    ("trial", "why"),
    [
        (Trial(failed=2, errors={"cut": 2}), "2 failed (2 x cut)"),
        (Trial(wrong_tokens=1), "1 wrong tokens"),
        (Trial(gap_ms=1200.0), "gap 1200 ms (limit 1000)"),
        (Trial(stall_ms=600.0), "stall 600 ms (limit 500)"),
        (Trial(recover_s=11.0), "recovery 11 s (limit 10)"),
        (Trial(recover_s=None), "recovery inf s (limit 10)"),
        (Trial(extra_calls=6, calls=100), "extra calls 6 % (limit 5)"),
    ],
)
def test_every_limit_is_kept_or_the_row_does_not_hold(trial: Trial, why: str) -> None:
    bar = Bar(text="all", gap_ms=1000, stall_ms=500, recover_s=10, extra_calls_pct=5)
    finding = conclude("X", bar, [Trial(), trial], [], [])
    assert not finding.held
    assert why in finding.note
    assert conclude("X", bar, [Trial()], [], []).held


def test_a_row_without_a_trial_or_with_a_broken_promise_does_not_hold() -> None:
    bar = Bar(text="anything")
    assert not conclude("X", bar, [], [], []).held
    assert not conclude("X", bar, [Trial()], ["not ejected"], []).held
    assert not conclude("X", bar, [Trial(recover_s=None)], [], []).held
    unknown = conclude("X", bar, [Trial(calls=None)], [], [])
    assert unknown.extra_calls_pct is None
