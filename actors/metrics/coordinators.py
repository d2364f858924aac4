"""What coordinators say of themselves and of the load of their experts, as metrics.

Each counter has the label `coordinator`: so its series ends and starts again with the process that counts, as
Prometheus expects. Across several front doors the series are the same ones; dashboards take their `max`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.metrics.family import MAX_EXPERT_SERIES, QUANTILES, Facts, Family, LabelValues, by_quantile
from actors.metrics.increments import Increments
from cluster.load import balancedness

IntArray = npt.NDArray[np.int64]
STANDINGS = ("healthy", "ejected", "probing", "quarantined", "away")


class CoordinatorMetrics:
    """Used by one exporter, which looks again and again."""

    def __init__(self) -> None:
        self._ejections = Increments()

    def families(self, coordinators: Sequence[Facts]) -> Iterator[Family]:
        """All families; those of which nothing is known have no samples."""
        told = sorted(coordinators, key=lambda facts: str(facts["coordinator_id"]))
        yield from _gauges(told)
        yield from _counters(told)
        yield _standings(told)
        yield self._ejected(told)
        yield from _loads(told)
        yield _busy_shares(told)

    def _ejected(self, told: Sequence[Facts]) -> Family:
        self._ejections.since_last(
            {
                (facts["coordinator_id"], facts.get("pid"), one["replica_id"]): float(one["ejections_total"])
                for facts in told
                for one in facts.get("replica_health", ())
            }
        )
        samples: dict[LabelValues, float] = {(): self._ejections.total} if told else {}
        text = "Times that a replica was passed over because it was slow or silent, seen since this exporter started"
        return Family("octavo_replica_ejections", "counter", text, (), samples)


def kv_usage(facts: Facts) -> float:
    """Share of the KV blocks in use, 0 to 1."""
    total = facts.get("kv_blocks_total", 0)
    return float((total - facts.get("kv_blocks_free", 0)) / total) if total else 0.0


_GAUGES: Mapping[tuple[str, str], Callable[[Facts], float]] = {
    ("octavo_coordinator_up", "1 while the coordinator answers and is ready"): lambda f: f.get("state") == "ready",
    ("octavo_num_requests_running", "Sequences in the running batch"): lambda f: f.get("num_running", 0),
    ("octavo_num_requests_waiting", "Sequences that wait to run"): lambda f: f.get("num_waiting", 0),
    ("octavo_queue_age_seconds", "Age of the request that has waited longest"): lambda f: f.get("queue_s", 0.0),
    ("octavo_kv_blocks_total", "KV blocks"): lambda f: f.get("kv_blocks_total", 0),
    ("octavo_kv_blocks_free", "KV blocks nobody holds"): lambda f: f.get("kv_blocks_free", 0),
    ("octavo_kv_blocks_cached", "KV blocks that later prompts may share"): lambda f: f.get("kv_blocks_cached", 0),
    ("octavo_kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1"): kv_usage,
    ("octavo_map_epoch", "Epoch of the expert map in force"): lambda f: f.get("map_epoch", 0),
    ("octavo_trace_listeners", "Who records which experts tokens take"): lambda f: f.get("trace_listeners", 0),
}

_COUNTERS: Mapping[str, tuple[str, str]] = {
    "octavo_steps": ("steps_total", "Steps of the engine"),
    "octavo_step_seconds": ("step_s_total", "Time in steps"),
    "octavo_expert_wait_seconds": ("expert_wait_s_total", "Time in steps that was spent waiting for experts"),
    "octavo_preemptions": ("preemptions_total", "Sequences put back to recompute for want of KV blocks"),
    "octavo_prefix_queries_tokens": (
        "prefix_queries_tokens_total",
        "Tokens of requests that were looked up in the KV cache when they began",
    ),
    "octavo_prefix_hits_tokens": ("prefix_hits_tokens_total", "Of these, found there and not computed"),
    "octavo_draft_tokens": ("draft_tokens_total", "Tokens guessed and computed ahead"),
    "octavo_accepted_draft_tokens": ("accepted_draft_tokens_total", "Tokens guessed right, each of which saved a step"),
    "octavo_expert_calls": ("expert_calls_total", "Messages to experts, those sent again included"),
    "octavo_expert_retries": ("expert_retries_total", "Expert messages that were sent again"),
    "octavo_expert_hedges": (
        "hedges_total",
        "Expert messages sent beside one under way for the same rows, and probes",
    ),
    "octavo_expert_hedges_won": ("hedges_won_total", "Hedges that were answered first"),
    "octavo_wire_sent_bytes": ("wire_bytes_sent_total", "Bytes sent to experts"),
    "octavo_wire_received_bytes": ("wire_bytes_received_total", "Bytes received from experts"),
    "octavo_grammars_compiled": ("grammars_compiled_total", "Grammars compiled"),
    "octavo_grammars_refused": ("grammars_refused_total", "Grammars that were wrong or too complex to compile"),
    "octavo_grammar_hits": ("grammar_hits_total", "Requests whose grammar was known already"),
    "octavo_grammar_masks": ("grammar_masks_total", "Tokens that had to follow a grammar"),
    "octavo_grammar_mask_seconds": ("grammar_mask_s_total", "Time spent on finding out which tokens fit a grammar"),
    "octavo_trace_tokens": ("trace_tokens_total", "Tokens whose experts were recorded, by all who listened"),
    "octavo_trace_dropped_tokens": ("trace_dropped_tokens_total", "Tokens that a trace lacks: its reader was slow"),
}


def _gauges(told: Sequence[Facts]) -> Iterator[Family]:
    for (name, text), value in _GAUGES.items():
        yield Family(name, "gauge", text, ("coordinator",), {_name(facts): float(value(facts)) for facts in told})


def _counters(told: Sequence[Facts]) -> Iterator[Family]:
    for name, (field, text) in _COUNTERS.items():
        samples = {_name(facts): float(facts.get(field, 0)) for facts in told}
        yield Family(name, "counter", text, ("coordinator",), samples)


def _standings(told: Sequence[Facts]) -> Family:
    samples: dict[LabelValues, float] = {}
    for facts in told:
        states = [one["state"] for one in facts.get("replica_health", ())]
        samples |= {(*_name(facts), state): float(states.count(state)) for state in STANDINGS}
    return Family(
        "octavo_expert_replicas",
        "gauge",
        "Expert replicas by how they stand with a coordinator",
        ("coordinator", "state"),
        samples,
    )


def _loads(told: Sequence[Facts]) -> Iterator[Family]:
    yield Family(
        "octavo_expert_tokens", "counter", "Tokens routed to each expert, over all layers", *_expert_tokens(told)
    )
    even: dict[LabelValues, float] = {}
    hottest: dict[LabelValues, float] = {}
    window_LE = sum_loads([facts.get("window_load", ()) for facts in told])
    if window_LE.size:
        share_L = window_LE.max(axis=1) / np.maximum(window_LE.sum(axis=1), 1)
        even, hottest = _over_layers(balancedness(window_LE)), _over_layers(share_L)
    text = "Mean by max load of the experts of a layer, recent window; quantiles over layers, 1 is even"
    yield Family("octavo_expert_balancedness", "gauge", text, ("quantile",), even)
    text = "Share of a layer's tokens that its hottest expert takes, recent window; quantiles over layers"
    yield Family("octavo_hottest_expert_share", "gauge", text, ("quantile",), hottest)


def _expert_tokens(told: Sequence[Facts]) -> tuple[tuple[str, ...], dict[LabelValues, float]]:
    by_expert = {_name(facts): sum_loads([facts["load"]]).sum(axis=0) for facts in told if facts.get("load")}
    if sum(len(load_E) for load_E in by_expert.values()) > MAX_EXPERT_SERIES:
        return ("coordinator", "expert"), {(*name, "all"): float(load_E.sum()) for name, load_E in by_expert.items()}
    samples = {
        (*name, str(expert)): float(tokens)
        for name, load_E in by_expert.items()
        for expert, tokens in enumerate(load_E)
    }
    return ("coordinator", "expert"), samples


def _busy_shares(told: Sequence[Facts]) -> Family:
    """A replica serves all coordinators, each of which knows the time that it computes for it."""
    busy: dict[str, float] = {}
    for facts in told:
        for one in facts.get("replica_times", ()):
            busy[one["replica_id"]] = busy.get(one["replica_id"], 0.0) + float(one["busy_share"])
    samples = _over_layers(np.array(list(busy.values()))) if busy else {}
    text = "Share of the recent window that a replica computes for coordinators; quantiles over replicas"
    return Family("octavo_replica_busy_share", "gauge", text, ("quantile",), samples)


def _over_layers(values: npt.NDArray[np.float64]) -> dict[LabelValues, float]:
    return by_quantile(dict(zip(QUANTILES, np.quantile(values, QUANTILES).tolist(), strict=True)))


def _name(facts: Facts) -> LabelValues:
    return (str(facts["coordinator_id"]),)


def sum_loads(loads: Sequence[Any]) -> IntArray:
    """Tokens per (layer, expert), summed over coordinators; (0, 0) when none has told."""
    told = [load for load in loads if load]
    return np.sum(np.asarray(told, dtype=np.int64), axis=0) if told else np.zeros((0, 0), dtype=np.int64)
