"""A rate per minute: bursts up to a minute's worth, steady refilling, debts, and when there will be enough."""

import random
from math import inf

import pytest

from cluster.token_bucket import TokenBucket


def test_a_minute_s_worth_at_once_then_steadily() -> None:
    bucket = TokenBucket(60, 100.0)
    assert [bucket.take(1, 100.0) for _ in range(61)] == [True] * 60 + [False]
    assert bucket.wait_s(1, 100.0) == 1.0
    assert not bucket.take(1, 100.5)
    assert bucket.take(1, 101.0)
    assert (bucket.level(101.0), bucket.full_s(101.0)) == (0.0, 60.0)
    assert bucket.level(1000.0) == 60.0, "never more than a minute's worth"
    assert bucket.full_s(1000.0) == 0.0


def test_what_was_not_used_comes_back_and_what_was_used_beyond_is_a_debt() -> None:
    bucket = TokenBucket(600, 0.0)
    assert bucket.take(500, 0.0)
    bucket.put(400, 0.0)
    assert bucket.level(0.0) == 500
    bucket.put(-700, 0.0)
    assert bucket.level(0.0) == -200
    assert not bucket.take(1, 19.0)
    assert bucket.wait_s(100, 0.0) == pytest.approx(30.0)
    assert bucket.take(100, 30.0)
    bucket.put(10**9, 30.0)
    assert bucket.level(30.0) == 600


def test_more_than_it_ever_holds_is_never_there() -> None:
    bucket = TokenBucket(10, 0.0)
    assert not bucket.take(11, 10_000.0)
    assert bucket.wait_s(11, 10_000.0) == inf


def test_in_the_long_run_the_rate_is_kept_whatever_is_asked() -> None:
    rng = random.Random(1)
    bucket, taken, now_s = TokenBucket(100, 0.0), 0, 0.0
    for _ in range(5000):
        now_s += rng.expovariate(1.0)
        amount = rng.randint(1, 20)
        wait_s = bucket.wait_s(amount, now_s)
        assert bucket.take(amount, now_s) == (wait_s == 0)
        taken += amount if wait_s == 0 else 0
    assert taken <= 100 + now_s * 100 / 60
    assert taken >= 0.95 * now_s * 100 / 60, "nor is anybody kept from it"
