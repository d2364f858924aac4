"""What Prometheus reads at /metrics: the front door's own counts, and the cluster's as of the last look at it.

The number of series is bounded: endpoints, reasons and states are closed sets, load is summed over layers or told as
quantiles, and metrics by expert have a limit (`actors.metrics.family`). One registry per front door. Names are ours,
`octavo_*`, and vLLM's beside them for the figures that tools look for. Looking at the cluster is
`actors.front.scrape`'s.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from actors.front.resubmission import Verdict
from actors.metrics import vllm_names
from actors.metrics.cluster import ClusterMetrics
from actors.metrics.coordinators import CoordinatorMetrics
from actors.metrics.facts import facts_of
from actors.metrics.family import Family
from actors.supervision.status import ClusterStatus
from protos.coordinator_pb2 import SnapshotReply

Snapshots = Callable[[], Mapping[str, SnapshotReply]]
Resubmissions = Callable[[], Mapping[Verdict, int]]
Status = Callable[[], ClusterStatus | None]

_LONGEST = 1 << 20


def _unknown() -> None:
    return None


class FrontMetrics:
    """Counters and histograms of one front door. `status` is the supervisor's view, None while it is not known."""

    def __init__(
        self,
        model: str,
        snapshots: Snapshots,
        resubmissions: Resubmissions = dict,
        status: Status = _unknown,
        max_model_len: int = _LONGEST,
    ) -> None:
        self._registry = CollectorRegistry()
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
        times = vllm_names.TOKEN_BUCKETS
        self.ttft = _histogram(
            "octavo_time_to_first_token_seconds", "From request to first token", vllm_names.TTFT_BUCKETS, make
        )
        self.itl = _histogram("octavo_inter_token_latency_seconds", "Between a choice's outputs", times, make)
        self.tpot = _histogram(
            "octavo_request_time_per_output_token_seconds",
            "Mean time of a choice's tokens after the first",
            times,
            make,
        )
        self.e2e = _histogram(
            "octavo_e2e_request_latency_seconds",
            "From request to the end of generation",
            vllm_names.REQUEST_BUCKETS,
            make,
        )
        lengths = vllm_names.length_buckets(max_model_len)
        self.prompt_lengths = _histogram("octavo_request_prompt_tokens", "Prompt tokens of a choice", lengths, make)
        self.answer_lengths = _histogram("octavo_request_generation_tokens", "Tokens of a choice", lengths, make)
        info = Gauge("octavo_model_info", "Always 1; the model's name is the label", ["model_name"], **make)
        info.labels(model).set(1)
        self._registry.register(ClusterCollector(model, snapshots, status))
        self._registry.register(ResubmissionCollector(resubmissions))
        alike = (self.ttft, self.itl, self.tpot, self.e2e, self.prompt_lengths, self.answer_lengths, self.finished)
        self._registry.register(VllmCollector(model, alike))

    @property
    def num_inflight(self) -> int:
        """Generation requests being served now."""
        return int(next(iter(self.inflight.collect())).samples[0].value)

    def choice_ended(self, reason: str, num_prompt: int, num_tokens: int) -> None:
        """One choice got its last token."""
        self.finished.labels(reason).inc()
        self.prompt_lengths.observe(num_prompt)
        self.answer_lengths.observe(num_tokens)

    def families(self) -> Iterator[Metric]:
        """All metrics as they are now."""
        return iter(self._registry.collect())

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)


class ResubmissionCollector:
    """Turns the pool's counts into a metric at scrape time."""

    def __init__(self, resubmissions: Resubmissions) -> None:
        self._resubmissions = resubmissions

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks of a collector."""
        counter = CounterMetricFamily(
            "octavo_resubmissions",
            "Sequences that went on at another coordinator, by what became of the former",
            labels=["reason"],
        )
        for reason, count in self._resubmissions().items():
            counter.add_metric([reason.value], float(count))
        yield counter


class ClusterCollector:
    """Turns snapshots and status into metrics at scrape time."""

    def __init__(self, model: str, snapshots: Snapshots, status: Status) -> None:
        self._model = model
        self._snapshots = snapshots
        self._status = status
        self._coordinators = CoordinatorMetrics()
        self._cluster = ClusterMetrics()

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks of a collector."""
        facts = [facts_of(reply) for reply in self._snapshots().values() if reply.coordinator_id]
        yield from map(_exported, self._coordinators.families(facts))
        yield from map(_exported, self._cluster.families(self._status()))
        yield from map(_exported, vllm_names.families(self._model, facts))


class VllmCollector:
    """The front door's own metrics once more, as vLLM names and labels them."""

    def __init__(self, model: str, metrics: Sequence[Counter | Histogram]) -> None:
        self._labels = dict(zip(vllm_names.LABELS, (model, vllm_names.ALL_ENGINES), strict=True))
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks of a collector."""
        for metric in self._metrics:
            for ours in metric.collect():
                theirs = Metric(_vllm(ours.name), ours.documentation, ours.type)
                for sample in ours.samples:
                    if not sample.name.endswith("_created"):
                        theirs.add_sample(_vllm(sample.name), self._labels | sample.labels, sample.value)
                yield theirs


def _vllm(name: str) -> str:
    return name.replace("octavo_", "vllm:", 1)


def _exported(family: Family) -> Metric:
    make = GaugeMetricFamily if family.kind == "gauge" else CounterMetricFamily
    metric: Metric = make(family.name, family.help, labels=family.labels)
    for labels, value in family.samples.items():
        metric.add_metric(labels, value)  # type: ignore[attr-defined]
    return metric


def _histogram(name: str, text: str, buckets: Sequence[float], make: dict[str, Any]) -> Histogram:
    return Histogram(name, text, buckets=buckets, **make)
