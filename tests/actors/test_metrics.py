"""What Prometheus reads: parsed with Prometheus' own parser; complete, bounded, and never going back."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from actors.front.metrics import FrontMetrics
from actors.front.resubmission import Verdict
from actors.metrics.coordinators import CoordinatorMetrics, sum_loads
from actors.metrics.facts import facts_of
from actors.metrics.family import MAX_EXPERT_SERIES
from actors.metrics.vllm_names import REQUEST_BUCKETS, TOKEN_BUCKETS, TTFT_BUCKETS, length_buckets
from actors.supervision.status import ReplicaStatus
from protos.coordinator_pb2 import LayerLoad, ReplicaHealth, SnapshotReply
from tests.support.statuses import balanced, status

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

VLLM = (("engine", "0"), ("model_name", "tiny"))
OF_ALL = (("engine", "all"), ("model_name", "tiny"))


def families(metrics: FrontMetrics) -> dict[str, Metric]:
    """Every family by name; a name that comes twice fails."""
    found = list(text_string_to_metric_families(metrics.render().decode()))
    names = Counter(family.name for family in found)
    assert names.most_common(1)[0][1] == 1, names.most_common(3)
    return {family.name: family for family in found}


def samples(metrics: FrontMetrics) -> Samples:
    """Every sample by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families(metrics).values()
        for sample in family.samples
    }


def snapshot(name: str, load: list[list[int]], **fields: Any) -> SnapshotReply:
    rows = [LayerLoad(tokens=row) for row in load]
    return SnapshotReply(coordinator_id=name, state="ready", load=rows, window_load=rows, **fields)


def test_the_front_doors_own_counts() -> None:
    metrics = FrontMetrics("tiny", dict)
    metrics.requests.labels("/v1/completions", "200").inc()
    metrics.ttft.observe(0.3)
    metrics.generation_tokens.inc(7)
    found = samples(metrics)
    assert found["octavo_http_requests_total", (("endpoint", "/v1/completions"), ("status", "200"))] == 1
    assert found["octavo_time_to_first_token_seconds_bucket", (("le", "0.25"),)] == 0
    assert found["octavo_time_to_first_token_seconds_bucket", (("le", "0.5"),)] == 1
    assert found["octavo_generation_tokens_total", ()] == 7
    assert found["octavo_model_info", (("model_name", "tiny"),)] == 1


def test_coordinators_as_of_their_snapshots() -> None:
    one = snapshot(
        "c0", [[4, 0], [2, 2]], num_running=3, num_waiting=1, kv_blocks_total=10, kv_blocks_free=4, map_epoch=2
    )
    counted = {"draft_tokens_total": 9, "accepted_draft_tokens_total": 4, "grammar_masks_total": 7}
    two = snapshot("c1", [[0, 4], [1, 1]], preemptions_total=5, grammar_mask_s_total=0.5, **counted)
    two.prefix_queries_tokens_total, two.prefix_hits_tokens_total, two.kv_blocks_cached = 70, 64, 3
    found = samples(FrontMetrics("tiny", lambda: {"b": two, "a": one}))
    assert found["octavo_num_requests_running", (("coordinator", "c0"),)] == 3
    assert found["octavo_num_requests_waiting", (("coordinator", "c0"),)] == 1
    assert found["octavo_kv_blocks_free", (("coordinator", "c0"),)] == 4
    assert found["octavo_kv_cache_usage_perc", (("coordinator", "c0"),)] == 0.6
    assert found["octavo_kv_cache_usage_perc", (("coordinator", "c1"),)] == 0
    assert found["octavo_map_epoch", (("coordinator", "c0"),)] == 2
    assert found["octavo_preemptions_total", (("coordinator", "c1"),)] == 5
    assert found["octavo_draft_tokens_total", (("coordinator", "c1"),)] == 9
    assert found["octavo_grammar_masks_total", (("coordinator", "c1"),)] == 7
    assert found["octavo_grammar_mask_seconds_total", (("coordinator", "c1"),)] == 0.5
    assert found["octavo_accepted_draft_tokens_total", (("coordinator", "c1"),)] == 4
    assert found["octavo_prefix_queries_tokens_total", (("coordinator", "c1"),)] == 70
    assert found["octavo_prefix_hits_tokens_total", (("coordinator", "c1"),)] == 64
    assert found["octavo_kv_blocks_cached", (("coordinator", "c1"),)] == 3
    assert found["octavo_coordinator_up", (("coordinator", "c1"),)] == 1


def test_replicas_by_how_they_stand_and_what_hedging_costs() -> None:
    health = [ReplicaHealth(replica_id=f"r{at}", state=state) for at, state in enumerate(["healthy"] * 2 + ["ejected"])]
    one = snapshot("c0", [], replica_health=health, hedges_total=3, hedges_won_total=2, expert_calls_total=90)
    found = samples(FrontMetrics("tiny", lambda: {"a": one}))
    states = {
        dict(labels)["state"]: value for (name, labels), value in found.items() if name == "octavo_expert_replicas"
    }
    assert states == {"healthy": 2, "ejected": 1, "probing": 0, "quarantined": 0, "away": 0}
    of = (("coordinator", "c0"),)
    counters = [found[f"octavo_expert_{name}_total", of] for name in ("hedges", "hedges_won", "calls")]
    assert counters == [3, 2, 90]


def test_expert_load_is_told_by_expert_and_balancedness_by_layer() -> None:
    one, two = snapshot("c0", [[4, 0], [2, 2]]), snapshot("c1", [[2, 0], [1, 1]])
    found = samples(FrontMetrics("tiny", lambda: {"a": one, "b": two}))
    assert found["octavo_expert_tokens_total", (("coordinator", "c0"), ("expert", "0"))] == 6
    assert found["octavo_expert_tokens_total", (("coordinator", "c1"), ("expert", "1"))] == 1
    assert found["octavo_expert_balancedness", (("quantile", "0"),)] == 0.5
    assert found["octavo_expert_balancedness", (("quantile", "1"),)] == 1.0
    assert found["octavo_hottest_expert_share", (("quantile", "1"),)] == 1.0
    assert found["octavo_hottest_expert_share", (("quantile", "0"),)] == 0.5


def test_what_a_replica_computes_for_all_coordinators_adds_up() -> None:
    def facts(name: str, **more: Any) -> dict[str, Any]:
        return {**facts_of(snapshot(name, [])), **more}

    def times(**shares: float) -> list[dict[str, Any]]:
        return [{"replica_id": replica, "busy_share": share} for replica, share in shares.items()]

    told = [
        facts("c0", queue_s=2.5, replica_times=times(r0=0.5, r1=0.1)),
        facts("c1", replica_times=times(r0=0.25)),
        {"coordinator_id": "c2"},
    ]
    found = {family.name: family.samples for family in CoordinatorMetrics().families(told)}
    assert found["octavo_replica_busy_share"]["1",] == 0.75
    assert found["octavo_replica_busy_share"]["0",] == pytest.approx(0.1)
    assert found["octavo_queue_age_seconds"] == {("c0",): 2.5, ("c1",): 0, ("c2",): 0}


def test_what_the_supervisor_sees() -> None:
    found = samples(FrontMetrics("tiny", dict, status=status))
    assert found["octavo_expert_copies_ready", (("expert", "1"),)] == 1
    assert found["octavo_expert_copies_wanted", (("expert", "1"),)] == 2
    assert found["octavo_expert_copies_missing", ()] == 2
    assert found["octavo_replicas", (("state", "ready"),)] == 2
    assert found["octavo_replicas", (("state", "dead"),)] == 0
    assert found["octavo_coordinators", (("state", "ready"),)] == 1
    assert found["octavo_cluster_state", (("state", "degraded"),)] == 1
    assert found["octavo_cluster_state", (("state", "ready"),)] == 0
    assert found["octavo_rebalances_total", ()] == 0


def test_a_state_that_nobody_knows_counts_too() -> None:
    strange = [ReplicaStatus(replica_id="r", state="moonstruck")]
    found = samples(FrontMetrics("tiny", dict, status=lambda: status(replicas=strange)))
    assert found["octavo_replicas", (("state", "other"),)] == 1


def test_balancing_moves() -> None:
    moves = {"proposed": [{}, {}], "done": [{}], "failed": []}
    told = balanced(mode="dry_run", policy="incremental", moves_total=4, moved_bytes_total=1e9, **moves)
    found = samples(FrontMetrics("tiny", dict, status=lambda: told))
    assert found["octavo_rebalances_total", ()] == 4
    assert found["octavo_rebalance_moved_bytes_total", ()] == 1e9
    assert found["octavo_balance_moves", (("outcome", "proposed"),)] == 2
    assert found["octavo_balance_moves", (("outcome", "failed"),)] == 0
    assert found["octavo_balance_mode", (("mode", "dry_run"),)] == 1
    assert found["octavo_balance_mode", (("mode", "on"),)] == 0


def test_before_any_snapshot_there_is_nothing_to_tell() -> None:
    found = samples(FrontMetrics("tiny", dict))
    assert not any(name.startswith(("octavo_expert_", "octavo_replica")) for name, _ in found)
    assert not any(math.isnan(value) for value in found.values())
    assert samples(FrontMetrics("tiny", lambda: {"a": SnapshotReply(state="loading")}))


def everything(num_layers: int, num_experts: int, num_coordinators: int, num_replicas: int) -> FrontMetrics:
    health = [ReplicaHealth(replica_id=f"r{at}", state="healthy") for at in range(num_replicas)]
    replies = {
        f"a{at}": snapshot(f"coordinator-{at}", [[1] * num_experts] * num_layers, replica_health=health)
        for at in range(num_coordinators)
    }
    replicas = [ReplicaStatus(replica_id=one.replica_id, state="ready") for one in health]
    metrics = FrontMetrics(
        "tiny", lambda: replies, lambda: dict.fromkeys(Verdict, 1), lambda: status(num_experts, replicas=replicas)
    )
    metrics.choice_ended("stop", 3, 4)
    return metrics


def test_series_grow_neither_with_layers_nor_with_replicas() -> None:
    few, many = (samples(everything(layers, 8, 2, replicas)) for layers, replicas in ((2, 8), (61, 512)))
    assert few.keys() == many.keys()
    assert len(few) < 600


def test_series_are_bounded_whatever_the_model_and_the_cluster() -> None:
    huge = samples(everything(2, MAX_EXPERT_SERIES + 1, 64, 8))
    by_name = Counter(name for name, _ in huge)
    assert by_name["octavo_expert_tokens_total"] == 64
    assert by_name["octavo_expert_copies_ready"] == 1
    assert huge["octavo_expert_copies_ready", (("expert", "all"),)] == MAX_EXPERT_SERIES + 1
    large = Counter(name for name, _ in samples(everything(2, 256, 16, 8)))
    assert large["octavo_expert_tokens_total"] == MAX_EXPERT_SERIES
    assert max(large.values()) <= MAX_EXPERT_SERIES


def test_every_family_has_a_type_and_a_text_and_a_proper_name() -> None:
    found = families(everything(2, 4, 2, 4))
    for name, family in found.items():
        assert family.documentation, name
        assert family.type in ("gauge", "counter", "histogram"), name
        assert name.startswith(("octavo_", "vllm:")), name
        assert all(sample.name.startswith(name) for sample in family.samples)
        assert (family.type == "counter") == any(sample.name.endswith("_total") for sample in family.samples) or (
            name == "octavo_kv_blocks_total" or not family.samples
        ), name


def test_what_tools_that_know_vllm_look_for() -> None:
    one = snapshot(
        "coordinator-0",
        [],
        num_running=3,
        num_waiting=1,
        kv_blocks_total=10,
        kv_blocks_free=4,
        kv_block_size=32,
        prompt_tokens_total=100,
        generated_tokens_total=50,
        preemptions_total=2,
        draft_tokens_total=6,
        accepted_draft_tokens_total=4,
        prefix_queries_tokens_total=90,
        prefix_hits_tokens_total=64,
    )
    metrics = FrontMetrics("tiny", lambda: {"a": one}, max_model_len=512)
    metrics.ttft.observe(0.05)
    metrics.itl.observe(0.02)
    metrics.tpot.observe(0.03)
    metrics.e2e.observe(1.2)
    metrics.choice_ended("stop", 30, 7)
    found = samples(metrics)
    assert found["vllm:num_requests_running", VLLM] == 3
    assert found["vllm:num_requests_waiting", VLLM] == 1
    assert found["vllm:kv_cache_usage_perc", VLLM] == 0.6
    assert found["vllm:prompt_tokens_total", VLLM] == 100
    assert found["vllm:generation_tokens_total", VLLM] == 50
    assert found["vllm:num_preemptions_total", VLLM] == 2
    assert found["vllm:spec_decode_num_draft_tokens_total", VLLM] == 6
    assert found["vllm:spec_decode_num_accepted_tokens_total", VLLM] == 4
    assert found["vllm:prefix_cache_queries_total", VLLM] == 90
    assert found["vllm:prefix_cache_hits_total", VLLM] == 64
    info = (("block_size", "32"), ("engine", "0"), ("model_name", "tiny"), ("num_gpu_blocks", "10"))
    assert found["vllm:cache_config_info", info] == 1
    assert found["vllm:request_success_total", (OF_ALL[0], ("finished_reason", "stop"), OF_ALL[1])] == 1
    sums = {
        "time_to_first_token_seconds": 0.05,
        "inter_token_latency_seconds": 0.02,
        "request_time_per_output_token_seconds": 0.03,
        "e2e_request_latency_seconds": 1.2,
        "request_prompt_tokens": 30,
        "request_generation_tokens": 7,
    }
    for name, value in sums.items():
        assert found[f"vllm:{name}_sum", OF_ALL] == found[f"octavo_{name}_sum", ()] == value
        assert found[f"vllm:{name}_count", OF_ALL] == 1


@pytest.mark.parametrize(
    ("name", "edges"),
    [
        ("time_to_first_token_seconds", TTFT_BUCKETS),
        ("inter_token_latency_seconds", TOKEN_BUCKETS),
        ("request_time_per_output_token_seconds", TOKEN_BUCKETS),
        ("e2e_request_latency_seconds", REQUEST_BUCKETS),
        ("request_prompt_tokens", (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)),
    ],
)
def test_bounds_of_buckets_are_vllms(name: str, edges: tuple[float, ...]) -> None:
    family = families(FrontMetrics("tiny", dict, max_model_len=512))[f"vllm:{name}"]
    told = [float(sample.labels["le"]) for sample in family.samples if sample.name.endswith("_bucket")]
    assert told == [*edges, math.inf]


def test_buckets_of_lengths() -> None:
    assert length_buckets(100) == (1, 2, 5, 10, 20, 50, 100)
    assert length_buckets(0) == (1,)


def test_counters_end_with_the_process_that_counts_and_sums_never_go_back() -> None:
    """A coordinator ends and starts again: its own series start again, others do not move, no sum over them falls."""
    replies: dict[str, SnapshotReply] = {}
    metrics = FrontMetrics("tiny", lambda: replies)

    def look(**coordinators: SnapshotReply) -> Samples:
        replies.clear()
        replies.update(coordinators)
        return samples(metrics)

    def one(name: str, pid: int, load: int, ejections: int) -> SnapshotReply:
        health = [ReplicaHealth(replica_id="r", state="healthy", ejections_total=ejections)]
        return snapshot(name, [[load]], pid=pid, replica_health=health, steps_total=load)

    looks = [
        look(a=one("c0", 1, 100, 4), b=one("c1", 2, 50, 2)),
        look(a=one("c0", 1, 110, 5), b=one("c1", 2, 60, 2)),
        look(b=one("c1", 2, 70, 2)),
        look(a=one("c0", 3, 8, 1), b=one("c1", 2, 80, 3)),
        look(a=one("c0", 3, 9, 1), b=one("c1", 2, 90, 3)),
    ]
    ejections = [found["octavo_replica_ejections_total", ()] for found in looks]
    assert ejections == [0, 1, 1, 3, 3], "what was before the first look is not counted, all that comes later is"
    for name in ("octavo_steps_total", "octavo_expert_tokens_total"):
        expert = (("expert", "0"),) if name == "octavo_expert_tokens_total" else ()
        of = {c: [found.get((name, (("coordinator", c), *expert))) for found in looks] for c in ("c0", "c1")}
        assert of == {"c0": [100, 110, None, 8, 9], "c1": [50, 60, 70, 80, 90]}


def test_loads_are_summed_over_coordinators_that_tell() -> None:
    rows: list[Any] = [[[1, 2]], [], [[10, 20]]]
    assert np.array_equal(sum_loads(rows), [[11, 22]])
    assert sum_loads([[], []]).shape == (0, 0)
