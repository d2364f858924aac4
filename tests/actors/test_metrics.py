"""What Prometheus reads: parsed with Prometheus' own parser, and bounded."""

import math
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from actors.front.metrics import MAX_LOAD_SERIES, FrontMetrics, sum_loads
from protos.coordinator_pb2 import LayerLoad, SnapshotReply

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(metrics: FrontMetrics) -> Samples:
    """Every sample by name and labels."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
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
    two = snapshot("c1", [[0, 4], [1, 1]], preemptions_total=5, draft_tokens_total=9, accepted_draft_tokens_total=4)
    found = samples(FrontMetrics("tiny", lambda: {"b": two, "a": one}))
    assert found["octavo_num_requests_running", (("coordinator", "c0"),)] == 3
    assert found["octavo_num_requests_waiting", (("coordinator", "c0"),)] == 1
    assert found["octavo_kv_blocks_free", (("coordinator", "c0"),)] == 4
    assert found["octavo_kv_cache_usage_perc", (("coordinator", "c0"),)] == 0.6
    assert found["octavo_kv_cache_usage_perc", (("coordinator", "c1"),)] == 0
    assert found["octavo_map_epoch", (("coordinator", "c0"),)] == 2
    assert found["octavo_preemptions_total", (("coordinator", "c1"),)] == 5
    assert found["octavo_draft_tokens_total", (("coordinator", "c1"),)] == 9
    assert found["octavo_accepted_draft_tokens_total", (("coordinator", "c1"),)] == 4
    assert found["octavo_coordinator_up", (("coordinator", "c1"),)] == 1


def test_expert_load_keeps_the_layer_axis_and_tells_balancedness() -> None:
    one, two = snapshot("c0", [[4, 0], [2, 2]]), snapshot("c1", [[2, 0], [1, 1]])
    found = samples(FrontMetrics("tiny", lambda: {"a": one, "b": two}))
    assert found["octavo_expert_tokens_total", (("expert", "0"), ("layer", "0"))] == 6
    assert found["octavo_expert_tokens_total", (("expert", "1"), ("layer", "1"))] == 3
    assert found["octavo_expert_balancedness", (("quantile", "0"),)] == 0.5
    assert found["octavo_expert_balancedness", (("quantile", "1"),)] == 1.0


def test_before_any_snapshot_there_is_nothing_to_tell() -> None:
    found = samples(FrontMetrics("tiny", dict))
    assert not any(name.startswith("octavo_expert_") for name, _ in found)
    assert not any(math.isnan(value) for value in found.values())
    assert samples(FrontMetrics("tiny", lambda: {"a": SnapshotReply(state="loading")}))


def test_the_number_of_series_is_bounded() -> None:
    experts = 64
    layers = MAX_LOAD_SERIES // experts + 1
    reply = snapshot("c0", [[1] * experts] * layers)
    found = [
        labels
        for name, labels in samples(FrontMetrics("tiny", lambda: {"a": reply}))
        if name == "octavo_expert_tokens_total"
    ]
    assert len(found) == experts
    assert (("expert", "3"), ("layer", "all")) in found


def test_loads_are_summed_over_coordinators_that_tell() -> None:
    rows = [[LayerLoad(tokens=[1, 2])], [], [LayerLoad(tokens=[10, 20])]]
    assert np.array_equal(sum_loads(rows), [[11, 22]])
    assert sum_loads([[], []]).shape == (0, 0)
