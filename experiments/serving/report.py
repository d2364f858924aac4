"""How a benchmark is told: a JSON line for each repeat, one with the medians, and a table to read. Text only."""

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.serving.metrics import Json
from experiments.serving.settings import ServeSettings

HEADERS = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
    "client_queue_time": ("Client-side Queueing", "Client Queue Time"),
}
LINES = {
    "completed": "Successful requests:",
    "failed": "Failed requests:",
    "max_concurrency": "Maximum request concurrency:",
    "request_rate": "Request rate configured (RPS):",
    "duration": "Benchmark duration (s):",
    "total_input_tokens": "Total input tokens:",
    "total_output_tokens": "Total generated tokens:",
    "request_throughput": "Request throughput (req/s):",
    "request_goodput": "Request goodput (req/s):",
    "output_throughput": "Output token throughput (tok/s):",
    "max_output_tokens_per_s": "Peak output token throughput (tok/s):",
    "max_concurrent_requests": "Peak concurrent requests:",
    "total_token_throughput": "Total token throughput (tok/s):",
    "client_cpu_s": "CPU time of this client (s):",
}
WIDTH = 50
DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times")


def heading(settings: ServeSettings, model: str, date: str) -> Json:
    """What was asked, in vLLM's keys where it has them; the same in every line of a benchmark."""
    backend = "openai-chat" if settings.is_chat else "openai"
    capped = settings.concurrency < settings.num_prompts
    return {
        "date": date,
        "endpoint_type": backend,
        "backend": backend,
        "label": None,
        "model_id": model,
        "tokenizer_id": None,
        "num_prompts": settings.num_prompts,
        "request_rate": settings.request_rate if settings.request_rate < float("inf") else "inf",
        "burstiness": settings.burstiness if settings.burstiness < float("inf") else "inf",
        "max_concurrency": settings.max_concurrency or (settings.concurrency if capped else None),
        "dataset_name": settings.dataset,
        "input_len": settings.input_len,
        "output_len": settings.output_len,
        "ignore_eos": settings.ignores_eos,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "repeats": settings.repeats,
    }


def medians(asked: Json, summaries: Sequence[Json]) -> Json:
    """The line over all repeats: each figure's median; reasons of failures are added up, so that none is hidden."""
    reasons: Counter[str] = Counter()
    for summary in summaries:
        reasons.update(summary["failure_reasons"])
    figures = {key: _median([summary[key] for summary in summaries]) for key in _numeric(summaries[0])}
    return {**asked, "aggregate": "median", **figures, "failure_reasons": dict(reasons)}


def json_line(line: Json) -> str:
    """One line of strict JSON."""
    return json.dumps(line, allow_nan=False)


def table(line: Json, metrics: Sequence[str]) -> str:
    """The figures of one line as vLLM prints them, several lines without an end of line after the last."""
    return "\n".join((*_figures(line), *(row for name in metrics for row in _latency(line, name)), "=" * WIDTH))


def _figures(line: Json) -> Iterator[str]:
    yield " Serving Benchmark Result ".center(WIDTH, "=")
    for key, label in LINES.items():
        if line.get(key) is not None:
            yield _row(label, line[key])
    for reason, count in line["failure_reasons"].items():
        yield _row(f"Failed, {reason}:", count)


def _latency(line: Json, name: str) -> Iterator[str]:
    title, short = HEADERS[name]
    yield title.center(WIDTH, "-")
    suffix = f"_{name}_ms"
    for key in (key for key in line if key.endswith(suffix)):
        statistic = key.removesuffix(suffix)
        yield _row(f"{statistic.capitalize()} {short} (ms):", line[key])


def _row(label: str, value: Any) -> str:
    shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<40} {shown}"


def _numeric(summary: Json) -> list[str]:
    return [key for key in summary if key not in (*DETAILS, "generated_texts", "errors", "failure_reasons", "repeat")]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
