"""What Prometheus reads at /metrics: the front door's own counts, and the coordinators' as of their last snapshot.

Names follow vLLM's with the prefix `octavo_`. The number of series is bounded: endpoints and reasons are
closed sets, and the layer axis of the expert load is kept only up to `MAX_LOAD_SERIES`. One registry per
front door.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cluster.load import balancedness
from protos.coordinator_pb2 import SnapshotReply

MAX_LOAD_SERIES = 4096
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)

Snapshots = Callable[[], Mapping[str, SnapshotReply]]


class FrontMetrics:
    """Counters and histograms of one front door."""

    def __init__(self, model: str, snapshots: Snapshots) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(ClusterCollector(snapshots))
        make: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter(
            "octavo_http_requests",
            "HTTP requests answered, by endpoint and status",
            ["endpoint", "status"],
            **make,
        )
        self.inflight = Gauge(
            "octavo_http_requests_inflight", "Generation requests being served by this ingress", **make
        )
        self.finished = Counter(
            "octavo_request_success", "Choices that ended, by finish reason", ["finished_reason"], **make
        )
        self.broken_streams = Counter(
            "octavo_stream_errors", "Streams that ended with an error event, by error code", ["code"], **make
        )
        self.disconnects = Counter("octavo_client_disconnects", "Requests whose client went away", **make)
        self.unexpected = Counter("octavo_unexpected_errors", "Exceptions answered with 500; see the log", **make)
        self.prompt_tokens = Counter("octavo_prompt_tokens", "Prompt tokens of accepted requests", **make)
        self.generation_tokens = Counter("octavo_generation_tokens", "Tokens received from coordinators", **make)
        self.ttft = _histogram("octavo_time_to_first_token_seconds", "From request to first token", make)
        self.itl = _histogram("octavo_inter_token_latency_seconds", "Between a choice's outputs", make)
        self.e2e = _histogram("octavo_e2e_request_latency_seconds", "From request to the end of generation", make)
        info = Gauge("octavo_model_info", "Always 1; the model's name is the label", ["model_name"], **make)
        info.labels(model).set(1)

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)


class ClusterCollector:
    """Turns snapshots into metrics at scrape time."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks of a collector."""
        replies = sorted(self._snapshots().values(), key=lambda reply: reply.coordinator_id)
        yield from _gauges(replies)
        yield from _counters(replies)
        yield from _loads(replies)


def _histogram(name: str, text: str, make: dict[str, Any]) -> Histogram:
    return Histogram(name, text, buckets=_SECONDS, **make)


def _gauges(replies: list[SnapshotReply]) -> Iterator[Metric]:
    values: dict[tuple[str, str], Callable[[SnapshotReply], float]] = {
        ("octavo_coordinator_up", "1 while the coordinator answers and is ready"): lambda r: r.state == "ready",
        ("octavo_num_requests_running", "Sequences in the running batch"): lambda r: r.num_running,
        ("octavo_num_requests_waiting", "Sequences that wait to run"): lambda r: r.num_waiting,
        ("octavo_kv_blocks_total", "KV blocks"): lambda r: r.kv_blocks_total,
        ("octavo_kv_blocks_free", "KV blocks nobody holds"): lambda r: r.kv_blocks_free,
        ("octavo_kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1"): _kv_usage,
        ("octavo_map_epoch", "Epoch of the expert map in force"): lambda r: r.map_epoch,
    }
    for (name, text), value in values.items():
        gauge = GaugeMetricFamily(name, text, labels=["coordinator"])
        for reply in replies:
            gauge.add_metric([reply.coordinator_id], float(value(reply)))
        yield gauge


def _counters(replies: list[SnapshotReply]) -> Iterator[Metric]:
    values = {
        "steps": "Steps of the engine",
        "preemptions": "Sequences put back to recompute for want of KV blocks",
        "draft_tokens": "Tokens guessed and computed ahead",
        "accepted_draft_tokens": "Tokens guessed right, each of which saved a step",
        "expert_retries": "Expert messages that were sent again",
    }
    for name, text in values.items():
        counter = CounterMetricFamily(f"octavo_{name}", text, labels=["coordinator"])
        for reply in replies:
            counter.add_metric([reply.coordinator_id], float(getattr(reply, f"{name}_total")))
        yield counter


def _loads(replies: list[SnapshotReply]) -> Iterator[Metric]:
    total_LE = sum_loads([reply.load for reply in replies])
    layers, experts = total_LE.shape
    tokens = CounterMetricFamily("octavo_expert_tokens", "Tokens routed to each expert", labels=["layer", "expert"])
    by_layer = layers * experts <= MAX_LOAD_SERIES
    rows = enumerate(total_LE) if by_layer else [("all", total_LE.sum(axis=0))]
    for layer, load_E in rows:
        for expert, load in enumerate(load_E):
            tokens.add_metric([str(layer), str(expert)], float(load))
    yield tokens
    even = GaugeMetricFamily(
        "octavo_expert_balancedness", "Mean by max load of a layer, recent window", labels=["quantile"]
    )
    window_LE = sum_loads([reply.window_load for reply in replies])
    if window_LE.size:
        for quantile, value in zip(QUANTILES, np.quantile(balancedness(window_LE), QUANTILES), strict=True):
            even.add_metric([f"{quantile:g}"], float(value))
    yield even


def sum_loads(loads: list[Any]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Tokens per (layer, expert), summed over coordinators; (0, 0) when none has told."""
    told = [[list(layer.tokens) for layer in load] for load in loads if load]
    return np.sum(np.asarray(told, dtype=np.int64), axis=0) if told else np.zeros((0, 0), dtype=np.int64)


def _kv_usage(reply: SnapshotReply) -> float:
    used = reply.kv_blocks_total - reply.kv_blocks_free
    return used / reply.kv_blocks_total if reply.kv_blocks_total else 0.0
