"""The figures of a serving benchmark, against examples worked out by hand."""

import pytest

from experiments.serving.metrics import (
    details,
    distribution,
    failure_reasons,
    latency_samples_s,
    max_concurrent_requests,
    max_output_tokens_per_s,
    num_good,
    summarize,
)
from experiments.serving.results import RequestFailed, RequestResult

# 3 tokens in 3 chunks: sent at 0, first token after 0.1, the others 0.2 and 0.3 later. TPOT = 0.5 / 2 = 0.25.
ONE = RequestResult(
    start_s=0.0, ttft_s=0.1, latency_s=0.6, itl_s=(0.2, 0.3), input_tokens=10, output_tokens=3, text="abc"
)
# 5 tokens in 2 chunks: the gap of 0.8 counts once among the ITLs, TPOT = 0.8 / 4 = 0.2.
TWO = RequestResult(
    start_s=0.5, queue_s=0.5, ttft_s=0.2, latency_s=1.0, itl_s=(0.8,), input_tokens=20, output_tokens=5, text="defgh"
)
# 1 token: no ITL, no TPOT.
SHORT = RequestResult(start_s=2.0, ttft_s=0.3, latency_s=0.3, input_tokens=30, output_tokens=1, text="i")
FAILED = RequestResult(start_s=0.0, queue_s=9.0, error="http_429: busy")


def test_a_run_worked_out_by_hand() -> None:
    summary = summarize(
        [ONE, FAILED, TWO, SHORT], 4.0, metrics=("ttft", "tpot", "itl", "e2el"), percentiles=(50, 90, 99)
    )
    assert summary["duration"] == 4.0
    assert (summary["completed"], summary["failed"]) == (3, 1)
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (60, 9)
    assert summary["request_throughput"] == 0.75
    assert summary["output_throughput"] == 2.25
    assert summary["total_token_throughput"] == 17.25
    assert summary["request_goodput"] is None
    assert summary["mean_ttft_ms"] == pytest.approx(200)
    assert summary["median_ttft_ms"] == pytest.approx(200)
    assert summary["std_ttft_ms"] == pytest.approx((20000 / 3) ** 0.5)
    assert summary["p90_ttft_ms"] == pytest.approx(280)  # 1.8 steps into 100, 200, 300
    assert summary["p99_ttft_ms"] == pytest.approx(298)
    assert summary["mean_tpot_ms"] == pytest.approx(225)
    assert summary["p50_itl_ms"] == pytest.approx(300)
    assert summary["mean_itl_ms"] == pytest.approx(1300 / 3)
    assert summary["median_e2el_ms"] == pytest.approx(600)
    assert summary["failure_reasons"] == {"http_429": 1}


def test_the_keys_are_those_of_vllm() -> None:
    summary = summarize([ONE], 1.0, metrics=("ttft",), percentiles=(50, 99.9), goodput=(("ttft", 1.0),))
    assert set(summary) == {
        "duration",
        "completed",
        "failed",
        "total_input_tokens",
        "total_output_tokens",
        "request_throughput",
        "request_goodput",
        "output_throughput",
        "total_token_throughput",
        "max_output_tokens_per_s",
        "max_concurrent_requests",
        "mean_ttft_ms",
        "median_ttft_ms",
        "std_ttft_ms",
        "p50_ttft_ms",
        "p99.9_ttft_ms",
        "failure_reasons",
    }
    assert all(type(value) in (int, float, dict) for value in summary.values())


def test_latencies_without_a_sample_are_none_and_not_zero() -> None:
    summary = summarize([SHORT], 1.0, metrics=("tpot", "itl", "ttft"), percentiles=(99,))
    assert summary["mean_tpot_ms"] is None
    assert summary["p99_itl_ms"] is None
    assert summary["p99_ttft_ms"] == pytest.approx(300)
    nothing = summarize([FAILED], 2.0, metrics=("ttft",), percentiles=(99,), goodput=(("ttft", 1e9),))
    assert (nothing["completed"], nothing["request_throughput"], nothing["request_goodput"]) == (0, 0.0, 0.0)
    assert nothing["mean_ttft_ms"] is None
    assert (nothing["max_output_tokens_per_s"], nothing["max_concurrent_requests"]) == (0.0, 0)


def test_a_failed_request_is_in_no_sample() -> None:
    summary = summarize([ONE, FAILED], 1.0, metrics=("client_queue_time", "e2el"), percentiles=())
    assert summary["mean_client_queue_time_ms"] == 0.0
    assert summary["mean_e2el_ms"] == pytest.approx(600)


def test_gaps_of_all_requests_count_alike() -> None:
    samples = latency_samples_s([ONE, TWO, SHORT])
    assert samples["itl"] == [0.2, 0.3, 0.8]
    assert samples["tpot"] == pytest.approx([0.25, 0.2])
    assert samples["client_queue_time"] == [0.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("goodput", "expected"),
    [
        ((("ttft", 200.0),), 2),
        ((("ttft", 199.9),), 1),
        ((("tpot", 200.1),), 2),  # TWO, and SHORT, which has none
        ((("ttft", 250.0), ("tpot", 220.0)), 1),
        ((("e2el", 1000.0),), 3),
        ((("e2el", 0.0),), 0),
        ((), 3),
    ],
)
def test_a_good_request_meets_every_limit(goodput: tuple[tuple[str, float], ...], expected: int) -> None:
    assert num_good([ONE, TWO, SHORT], goodput) == expected


def test_goodput_is_per_second() -> None:
    assert summarize([ONE, TWO], 4.0, metrics=(), percentiles=(), goodput=(("ttft", 150.0),))["request_goodput"] == 0.25


def test_most_requests_at_one_instant() -> None:
    assert max_concurrent_requests([ONE, TWO, SHORT]) == 2
    after = RequestResult(start_s=0.6, latency_s=1.0, output_tokens=1)
    assert max_concurrent_requests([ONE, after]) == 1, "one that starts as another ends is not beside it"
    assert max_concurrent_requests([ONE] * 7) == 7
    assert max_concurrent_requests([]) == 0


def test_most_tokens_in_a_second() -> None:
    # Second 0: ONE's 3 tokens, and TWO's first chunk at 0.7 with half of 5; second 1: TWO's second chunk at 1.5.
    assert max_output_tokens_per_s([ONE, TWO]) == pytest.approx(5.5)
    # Seconds count from the first request, not from the run.
    assert max_output_tokens_per_s([SHORT]) == 1.0


def test_one_sample_has_no_spread() -> None:
    assert distribution("itl", [0.004], (0, 100)) == pytest.approx(
        {"mean_itl_ms": 4.0, "median_itl_ms": 4.0, "std_itl_ms": 0.0, "p0_itl_ms": 4.0, "p100_itl_ms": 4.0}
    )


def test_reasons_are_counted_by_kind() -> None:
    errors = [str(RequestFailed("timeout", "a")), str(RequestFailed("http_429", "b: c")), "timeout: d", ""]
    results = [RequestResult(start_s=0.0, error=error) for error in errors]
    assert failure_reasons(results) == {"timeout": 2, "http_429": 1}
    many = [RequestResult(start_s=0.0, error=f"http_{code}: x") for code in range(400, 500)]
    assert len(failure_reasons(many)) == 20


def test_a_failures_text_is_one_short_line() -> None:
    text = str(RequestFailed("bad_stream", "a\n  b" + "c" * 1000))
    assert text.startswith("bad_stream: a bc")
    assert len(text) == 300


def test_details_are_in_the_order_of_the_requests() -> None:
    shown = details([ONE, FAILED])
    assert shown["input_lens"] == [10, 0]
    assert shown["output_lens"] == [3, 0]
    assert shown["ttfts"] == [0.1, 0.0]
    assert shown["itls"] == [[0.2, 0.3], []]
    assert shown["latencies"] == [0.6, 0.0]
    assert shown["queue_times"] == [0.0, 9.0]
    assert shown["generated_texts"] == ["abc", ""]
    assert shown["errors"] == ["", "http_429: busy"]
