"""What tools that know vLLM look for: its names, labels and bucket bounds, from the same figures as our own metrics.

As of vLLM 0.30 (`vllm/v1/metrics`). The label `engine` is the number in a coordinator's id; a histogram measured at the
front door is of all of them, and says `all`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, takewhile

from actors.metrics.coordinators import kv_usage
from actors.metrics.family import Facts, Family, LabelValues

ALL_ENGINES = "all"
LABELS = ("model_name", "engine")

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)

_GAUGES: Mapping[tuple[str, str], Callable[[Facts], float]] = {
    ("vllm:num_requests_running", "Requests in the running batch"): lambda f: f.get("num_running", 0),
    ("vllm:num_requests_waiting", "Requests that wait to run"): lambda f: f.get("num_waiting", 0),
    ("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1"): kv_usage,
}
_COUNTERS: Mapping[str, tuple[str, str]] = {
    "vllm:prompt_tokens": ("prompt_tokens_total", "Prompt tokens computed"),
    "vllm:generation_tokens": ("generated_tokens_total", "Tokens generated"),
    "vllm:num_preemptions": ("preemptions_total", "Sequences put back to recompute"),
    "vllm:prefix_cache_queries": ("prefix_queries_tokens_total", "Tokens looked up in the KV cache"),
    "vllm:prefix_cache_hits": ("prefix_hits_tokens_total", "Tokens found in the KV cache"),
    "vllm:spec_decode_num_draft_tokens": ("draft_tokens_total", "Tokens guessed and computed ahead"),
    "vllm:spec_decode_num_accepted_tokens": ("accepted_draft_tokens_total", "Tokens guessed right"),
}


def families(model: str, coordinators: Sequence[Facts]) -> Iterator[Family]:
    """What comes from the coordinators; the front door's own figures are `actors.front.metrics`'."""
    told: dict[LabelValues, Facts] = {(model, _engine(facts)): facts for facts in coordinators}
    for (name, text), value in _GAUGES.items():
        yield Family(name, "gauge", text, LABELS, {labels: float(value(facts)) for labels, facts in told.items()})
    for name, (field, text) in _COUNTERS.items():
        samples = {labels: float(facts.get(field, 0)) for labels, facts in told.items()}
        yield Family(name, "counter", text, LABELS, samples)
    cache: dict[LabelValues, float] = {
        (*labels, str(facts.get("kv_block_size", 0)), str(facts.get("kv_blocks_total", 0))): 1.0
        for labels, facts in told.items()
    }
    yield Family("vllm:cache_config_info", "gauge", "Always 1", (*LABELS, "block_size", "num_gpu_blocks"), cache)


def length_buckets(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, ... up to `most`."""
    return tuple(takewhile(lambda edge: edge <= most, (float(m * 10**e) for e in count() for m in (1, 2, 5)))) or (1.0,)


def _engine(facts: Facts) -> str:
    name = str(facts["coordinator_id"])
    number = name.rpartition("-")[2]
    return number if number.isdecimal() else name
