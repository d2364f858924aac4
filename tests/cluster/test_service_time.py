"""The affine fit finds the line, forgets the past, survives nonsense, and never goes negative."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.service_time import AffineFit, ServiceTime, busy_seconds, quantiles

PRIOR = ServiceTime(1e-3, 1e-4)


def fitted(pairs: list[tuple[int, float]], **options: float) -> ServiceTime:
    fit = AffineFit(PRIOR, **options)  # type: ignore[arg-type]
    for tokens, seconds in pairs:
        fit.observe(tokens, seconds)
    return fit.service_time


def test_without_measurements_it_is_the_prior() -> None:
    assert AffineFit(PRIOR).service_time == PRIOR


def test_it_finds_the_line_through_noise() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 300, 2000)
    seconds = (2e-3 + 5e-5 * tokens) * rng.normal(1, 0.05, 2000)
    found = fitted(list(zip(tokens.tolist(), seconds.tolist(), strict=True)), forgetting=0.998)
    assert found.a_s == pytest.approx(2e-3, rel=0.15)
    assert found.b_s == pytest.approx(5e-5, rel=0.05)
    assert found.ridge_tokens == pytest.approx(found.a_s / found.b_s)


def test_it_follows_a_host_that_becomes_slow_and_fast_again() -> None:
    sizes = [1, 8, 64, 200] * 100
    slow = [(n, 10 * PRIOR.seconds(n)) for n in sizes]
    assert fitted(slow).seconds(100) == pytest.approx(10 * PRIOR.seconds(100), rel=0.05)
    again = [(n, PRIOR.seconds(n)) for n in sizes * 2]
    assert fitted(slow + again).seconds(100) == pytest.approx(PRIOR.seconds(100), rel=0.1)


def test_one_hiccup_bends_it_little() -> None:
    calm = [(n, PRIOR.seconds(n)) for n in (1, 8, 64, 200) * 20]
    assert fitted([*calm, (8, 60.0)]).seconds(100) < 1.2 * PRIOR.seconds(100)


def test_calls_of_one_size_fit_the_level_and_take_the_slope_from_the_prior() -> None:
    found = fitted([(16, 0.01)] * 2000, forgetting=0.98)
    assert found.seconds(16) == pytest.approx(0.01, rel=1e-6)
    assert found.ridge_tokens == pytest.approx(PRIOR.ridge_tokens, rel=1e-3)
    rng = np.random.default_rng(1)
    noisy = fitted([(16, 0.01 * level) for level in rng.normal(1, 0.2, 2000).tolist()])
    assert noisy.seconds(16) == pytest.approx(0.01, rel=0.1)
    assert noisy.ridge_tokens == pytest.approx(PRIOR.ridge_tokens, rel=0.01), "noise is no slope"


def test_the_prior_has_no_say_in_the_level() -> None:
    assert fitted([(16, 5.0)]).seconds(16) == pytest.approx(5.0)
    assert fitted([(16, 5e-6)]).seconds(16) == pytest.approx(5e-6)


def test_calls_of_two_sizes_outvote_the_prior() -> None:
    flat = fitted([(2, 0.01), (300, 0.011)] * 50)
    assert (flat.a_s, flat.b_s) == pytest.approx((0.01, 1e-3 / 298), rel=0.05)
    steep = fitted([(2, 2e-3), (300, 0.3)] * 50)
    assert steep.b_s == pytest.approx(1e-3, rel=0.05)
    assert steep.a_s == pytest.approx(0, abs=5e-5)


def test_calls_measured_together_are_told_apart() -> None:
    fit = AffineFit(PRIOR)
    rng = np.random.default_rng(2)
    for _ in range(500):
        calls = int(rng.integers(1, 5))
        tokens = calls + int(rng.integers(0, 200))
        fit.observe(tokens, (4e-3 * calls + 2e-5 * tokens) * float(rng.normal(1, 0.05)), calls)
    assert (fit.a_s, fit.b_s) == pytest.approx((4e-3, 2e-5), rel=0.1)
    assert fit.service_time == ServiceTime(fit.a_s, fit.b_s)


def test_small_calls_are_not_drowned_by_the_noise_of_large_ones() -> None:
    rng = np.random.default_rng(3)
    sizes = [4, 4, 4, 4000] * 200
    found = fitted([(n, (1e-3 + 1e-4 * n) * level) for n, level in zip(sizes, rng.normal(1, 0.1, 800), strict=True)])
    assert found.seconds(4) == pytest.approx(1.4e-3, rel=0.05)
    assert found.seconds(4000) == pytest.approx(0.401, rel=0.05)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 100_000), st.floats(0, 1e4), st.integers(1, 64)), max_size=60),
    st.sampled_from([PRIOR, ServiceTime(0.0, 1e-7), ServiceTime(10.0, 0.0), ServiceTime(1e-7, 1.0)]),
)
def test_coefficients_stay_finite_and_not_negative(calls: list[tuple[int, float, int]], prior: ServiceTime) -> None:
    fit = AffineFit(prior)
    for tokens, seconds, num in calls:
        fit.observe(tokens, seconds, min(num, tokens))
    assert 0 <= fit.a_s < math.inf
    assert 0 <= fit.b_s < math.inf


@pytest.mark.parametrize(("tokens", "seconds"), [(0, 1.0), (1, -1.0), (1, math.nan), (1, math.inf)])
def test_impossible_measurements_are_refused(tokens: int, seconds: float) -> None:
    with pytest.raises(ValueError, match=f"a call of {tokens} tokens"):
        AffineFit(PRIOR).observe(tokens, seconds)


def test_more_calls_than_tokens_are_refused() -> None:
    for calls in (0, 5):
        with pytest.raises(ValueError, match=f"{calls} calls of 4 tokens"):
            AffineFit(PRIOR).observe(4, 1.0, calls)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match="calls that take no time have no shape"):
        AffineFit(ServiceTime(0.0, 0.0))
    with pytest.raises(ValueError, match="forgetting is 0"):
        AffineFit(PRIOR, forgetting=0)
    with pytest.raises(ValueError, match="clip 1"):
        AffineFit(PRIOR, clip=1)
    with pytest.raises(ValueError, match="b_s is -1"):
        ServiceTime(0, -1)


def test_without_a_slope_there_is_no_ridge() -> None:
    assert ServiceTime(1e-3, 0).ridge_tokens == math.inf


def test_busy_seconds_count_calls_and_tokens() -> None:
    assert busy_seconds([[2, 0]], [[10, 0]], ServiceTime(1.0, 0.5)).tolist() == [[7.0, 0.0]]
    with pytest.raises(ValueError, match="calls_LE has shape"):
        busy_seconds([[1]], [[1, 2]], PRIOR)


def test_quantiles_name_the_worst_layer_first() -> None:
    assert quantiles([0.2, 0.4, 1.0]) == {0.0: 0.2, 0.5: 0.4, 1.0: 1.0}
    with pytest.raises(ValueError, match="finite numbers"):
        quantiles([])
