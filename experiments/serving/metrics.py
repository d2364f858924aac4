"""The figures of a run from its results: pure functions, with the keys and definitions of vLLM's `bench serve`.

Only full answers count in throughputs and latencies. Where vLLM writes 0 for a latency that nothing was measured
for, this writes None: an answer of one token has no time per output token.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.serving.results import RequestResult

Json = dict[str, Any]

MAX_REASONS = 20


def summarize(
    results: Sequence[RequestResult],
    duration_s: float,
    *,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    goodput: Sequence[tuple[str, float]] = (),
) -> Json:
    """All figures of one run. Throughputs are per second of `duration_s`, which must be more than 0."""
    complete = [result for result in results if result.is_complete]
    input_tokens = sum(result.input_tokens for result in complete)
    output_tokens = sum(result.output_tokens for result in complete)
    summary: Json = {
        "duration": duration_s,
        "completed": len(complete),
        "failed": len(results) - len(complete),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(complete) / duration_s,
        "request_goodput": num_good(complete, goodput) / duration_s if goodput else None,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (input_tokens + output_tokens) / duration_s,
        "max_output_tokens_per_s": max_output_tokens_per_s(complete),
        "max_concurrent_requests": max_concurrent_requests(complete),
    }
    samples = latency_samples_s(complete)
    for name in metrics:
        summary |= distribution(name, samples[name], percentiles)
    return summary | {"failure_reasons": failure_reasons(results)}


def details(results: Sequence[RequestResult]) -> Json:
    """One entry per request, in order, times in seconds; zeros for one that failed, whose error is not empty."""
    return {
        "input_lens": [result.input_tokens for result in results],
        "output_lens": [result.output_tokens for result in results],
        "ttfts": [result.ttft_s for result in results],
        "itls": [list(result.itl_s) for result in results],
        "latencies": [result.latency_s for result in results],
        "start_times": [result.start_s for result in results],
        "queue_times": [result.queue_s for result in results],
        "generated_texts": [result.text for result in results],
        "errors": [result.error for result in results],
    }


def latency_samples_s(complete: Sequence[RequestResult]) -> dict[str, list[float]]:
    """The measured seconds of each metric. Inter-token gaps of all requests count alike."""
    tpots = [result.tpot_s for result in complete]
    return {
        "ttft": [result.ttft_s for result in complete],
        "tpot": [tpot for tpot in tpots if tpot is not None],
        "itl": [gap for result in complete for gap in result.itl_s],
        "e2el": [result.latency_s for result in complete],
        "client_queue_time": [result.queue_s for result in complete],
    }


def distribution(name: str, samples_s: Sequence[float], percentiles: Sequence[float]) -> Json:
    """Mean, median, population standard deviation and percentiles (linear between samples) in ms."""
    ms = np.asarray(samples_s, dtype=np.float64) * 1000
    keys = [f"mean_{name}_ms", f"median_{name}_ms", f"std_{name}_ms"]
    keys += [f"p{percentile:g}_{name}_ms" for percentile in percentiles]
    if not ms.size:
        return dict.fromkeys(keys)
    values = [ms.mean(), np.median(ms), ms.std(), *np.percentile(ms, list(percentiles))]
    return {key: float(value) for key, value in zip(keys, values, strict=True)}


def num_good(complete: Sequence[RequestResult], goodput: Sequence[tuple[str, float]]) -> int:
    """Requests that meet every limit (ms). One token has no time per output token, so it meets any limit on that."""

    def measured_ms(result: RequestResult, name: str) -> float:
        seconds = {"ttft": result.ttft_s, "tpot": result.tpot_s or 0.0, "e2el": result.latency_s}
        return seconds[name] * 1000

    return sum(all(measured_ms(result, name) <= limit for name, limit in goodput) for result in complete)


def max_concurrent_requests(complete: Sequence[RequestResult]) -> int:
    """Most requests between sending and last token at one instant; one that ends when another starts is over."""
    changes = [(result.start_s, 1) for result in complete]
    changes += [(result.start_s + result.latency_s, -1) for result in complete]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def max_output_tokens_per_s(complete: Sequence[RequestResult]) -> float:
    """Most tokens in one of the whole seconds after the first request; a request's chunks share its tokens evenly.

    vLLM counts each chunk as one token here, which is less than there were when a chunk carries several.
    """
    if not complete:
        return 0.0
    origin_s = min(result.start_s for result in complete)
    weights: dict[int, float] = {}
    for result in complete:
        at_s = result.start_s + result.ttft_s - origin_s
        share = result.output_tokens / (len(result.itl_s) + 1)
        for gap in (0.0, *result.itl_s):
            at_s += gap
            weights[int(at_s)] = weights.get(int(at_s), 0.0) + share
    return max(weights.values())


def failure_reasons(results: Sequence[RequestResult]) -> dict[str, int]:
    """How many requests failed for each kind of reason, the most frequent first."""
    kinds = Counter(result.error.partition(":")[0] for result in results if result.error)
    return dict(kinds.most_common(MAX_REASONS))
