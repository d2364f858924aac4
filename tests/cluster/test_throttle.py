"""A token bucket: whoever waits as told keeps to the rate, however the portions are cut and whatever the clock does."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.throttle import Throttle, begin, take

RATES = st.floats(min_value=1.0, max_value=1e12)
PORTIONS = st.lists(st.tuples(st.integers(0, 1 << 24), st.floats(0.0, 5.0)), min_size=1, max_size=60)


@given(RATES, st.integers(0, 1 << 22), PORTIONS)
def test_in_any_span_of_time_no_more_than_rate_and_burst_and_one_portion(
    rate: float, burst: int, portions: list[tuple[int, float]]
) -> None:
    """Portions are used when their wait is over; between them their user is busy elsewhere for a while."""
    throttle = Throttle(rate, burst)
    now_s, state = 0.0, begin(throttle, 0.0)
    used: list[tuple[float, int]] = []
    for num_bytes, busy_s in portions:
        wait_s, state = take(throttle, state, num_bytes, now_s)
        assert wait_s >= 0
        now_s += wait_s
        used.append((now_s, num_bytes))
        now_s += busy_s
    largest = max(num_bytes for num_bytes, _ in portions)
    for first in range(len(used)):
        for last in range(first, len(used)):
            span_s = used[last][0] - used[first][0]
            total = sum(num_bytes for _, num_bytes in used[first : last + 1])
            limit = rate * span_s + burst + largest
            assert total <= limit * (1 + 1e-9) + 1, (total, limit)


@given(RATES, st.integers(0, 1 << 22), st.lists(st.integers(1, 1 << 24), min_size=2, max_size=200))
def test_who_is_never_busy_elsewhere_gets_the_whole_rate(rate: float, burst: int, portions: list[int]) -> None:
    throttle = Throttle(rate, burst)
    now_s, state = 0.0, begin(throttle, 0.0)
    for num_bytes in portions:
        wait_s, state = take(throttle, state, num_bytes, now_s)
        now_s += wait_s
    expected_s = max(0, sum(portions) - burst) / rate
    assert math.isclose(now_s, expected_s, rel_tol=1e-6, abs_tol=1e-9)


def test_a_pause_saves_up_no_more_than_a_burst_and_a_clock_that_goes_back_nothing() -> None:
    throttle = Throttle(bytes_per_s=100.0, burst_bytes=50.0)
    _, state = take(throttle, begin(throttle, 0.0), 50, 0.0)
    wait_s, _ = take(throttle, state, 60, 1000.0)
    assert wait_s == pytest.approx(0.1)
    wait_s, back = take(throttle, state, 10, -5.0)
    assert wait_s == pytest.approx(0.1)
    assert back.at_s == 0.0
    wait_s, _ = take(throttle, back, 0, 0.0)
    assert wait_s == pytest.approx(0.1), "the time that passed twice was not paid twice"


@pytest.mark.parametrize(("rate", "burst"), [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, -1.0), (1.0, math.nan)])
def test_bounds_that_make_no_sense(rate: float, burst: float) -> None:
    with pytest.raises(ValueError, match="bytes/s with bursts of"):
        Throttle(rate, burst)
