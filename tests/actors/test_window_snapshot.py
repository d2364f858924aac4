"""The dashboard's snapshot: what it says of a reading, that rates survive restarts, and that it stays small."""

import json
from dataclasses import replace
from typing import Any

import pytest

from actors.metrics.facts import facts_of
from actors.supervision.status import BalanceStatus, CoordinatorStatus
from actors.window.reading import LATENCY_S, MAX_EPOCHS, Buckets, FrontCounts, History, Reading
from actors.window.snapshot import (
    MAX_CELLS,
    MAX_EVENTS,
    MAX_MOVES,
    MAX_REPLICAS,
    MAX_TEXT,
    Snapshot,
    make_snapshot,
)
from protos.coordinator_pb2 import LayerLoad
from tests.support.window import AT_S, SeenCluster, load_of

FIELDS = {
    *("version", "source", "at_s", "cluster", "load", "copies", "replicas", "coordinators", "totals", "front"),
    *("balance", "epochs", "events", "left_out"),
}
BOUNDS = (0.1, 0.2, 0.4, float("inf"))


def read(cluster: SeenCluster, clock_s: float = 0.0, **changes: Any) -> Reading:
    parts: dict[str, Any] = {
        "at_s": AT_S + clock_s,
        "clock_s": clock_s,
        "status": cluster.status(),
        "coordinators": [facts_of(cluster.reply())],
    }
    return Reading(**{**parts, **changes})


def seen(*readings: Reading) -> Snapshot:
    """The snapshot of the last reading; it must be JSON without NaN."""
    history = History()
    for one in readings:
        history = history.after(one)
    found = make_snapshot(readings[-1], history, "ingress")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def front(ttft: tuple[int, ...], itl: tuple[int, ...] = (0, 0, 0, 0)) -> FrontCounts:
    return FrontCounts(num_inflight=2, ttft=Buckets(BOUNDS, ttft), itl=Buckets(BOUNDS, itl))


# --- percentiles and rates ---


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ((0, 0, 0, 0), 0.5, None),
        ((10, 10, 10, 10), 0.5, 0.05),
        ((0, 10, 10, 10), 0.5, 0.15),
        ((0, 10, 10, 10), 1.0, 0.2),
        ((5, 10, 10, 10), 0.5, 0.1),
        ((0, 0, 0, 10), 0.5, 0.4),
        ((1, 1, 1, 2), 0.99, 0.4),
    ],
)
def test_percentiles_are_prometheus(counts: tuple[int, ...], share: float, expected: float | None) -> None:
    found = Buckets(BOUNDS, counts).quantile(share)
    assert found == (None if expected is None else pytest.approx(expected))


def test_no_histogram_has_no_percentile() -> None:
    assert Buckets().quantile(0.5) is None
    assert Buckets(BOUNDS, (1, 1, 1, 1)).since(Buckets()).total == 1


def test_latencies_are_those_of_the_last_minute() -> None:
    one = SeenCluster()
    readings = [
        read(one, 0.0, front=front((100, 100, 100, 100))),
        read(one, LATENCY_S + 1, front=front((100, 100, 100, 100))),
        read(one, LATENCY_S + 2, front=front((100, 104, 104, 104))),
    ]
    assert seen(*readings)["front"] == {
        "num_inflight": 2,
        "ttft": {"count": 4, "p50_s": 0.15, "p99_s": 0.199},
        "itl": {"count": 0, "p50_s": None, "p99_s": None},
    }
    assert len(History().after(readings[0]).after(readings[1]).tallies) == 1
    assert seen(read(one))["front"] is None


def test_tokens_a_second_are_of_the_last_seconds_and_a_restart_is_no_burst() -> None:
    one = SeenCluster()
    readings = [read(one)]
    assert seen(*readings)["totals"]["generated_tokens_per_s"] is None, "one look knows no rate"
    for second in range(1, 5):
        one.generated += 50
        readings.append(read(one, second))
    assert seen(*readings)["totals"]["generated_tokens_per_s"] == 50.0
    assert seen(*readings)["coordinators"][0]["prompt_tokens_per_s"] == 150.0
    one.fields["pid"] = 4712  # another process, that has counted a lot since it was last looked at
    one.generated = 1_000_000
    readings.append(read(one, 5.0))
    assert seen(*readings)["totals"]["generated_tokens_per_s"] is None
    one.generated += 10
    readings.append(read(one, 6.0))
    assert seen(*readings)["totals"]["generated_tokens_per_s"] == 10.0
    readings.append(read(one, 60.0))
    assert seen(*readings)["totals"]["generated_tokens_per_s"] is None, "nobody looked for a while"


# --- what is told ---


def test_it_tells_a_whole_cluster() -> None:
    one = SeenCluster(2, 4, num_replicas=2)
    one.load = [[10, 20, 30, 40], [0, 0, 0, 0]]
    found = seen(read(one))
    assert set(found) == FIELDS
    assert found["cluster"] == {
        "state": "ready",
        "model": "mixtral-tiny",
        "map_epoch": 3,
        "system_fingerprint": "fp_0123456789abcdef",
        "uptime_s": 5025.0,
        "age_s": 0.0,
        "coordinators_age_s": 0.0,
    }
    assert found["load"] == {
        "window_s": 60.0,
        "num_layers": 2,
        "num_experts": 4,
        "tokens": one.load,
        "balancedness": [0.625, 1.0],
        "mean_balancedness": 0.812,
    }
    assert found["copies"][3] == {"expert_id": 3, "ready": 2, "wanted": 2}
    assert [row["replica_id"] for row in found["replicas"]] == one.names
    row = found["replicas"][1]
    assert (row["expert_ids"], row["first_layer"], row["last_layer"]) == ([0], 0, 1)
    assert (row["state"], row["standing"], row["reasons"], row["busy_share"]) == ("ready", "healthy", [], 0.2)
    coordinator = found["coordinators"][0]
    assert (coordinator["kv_used"], coordinator["kv_total"], coordinator["num_running"]) == (28, 728, 3)
    assert (coordinator["preemptions_total"], coordinator["map_epoch"]) == (2, 3)


def test_loads_of_coordinators_are_added_and_a_queue_is_as_old_as_the_oldest() -> None:
    one = SeenCluster(1, 2)
    one.load = [[1, 3]]
    one.fields |= {"num_waiting": 2, "queue_s": 0.5}
    other = facts_of(one.reply()) | {"coordinator_id": "coordinator-1", "pid": 9, "queue_s": 2.0}
    found = seen(read(one, coordinators=[facts_of(one.reply()), other]))
    assert found["load"]["tokens"] == [[2, 6]]
    assert (found["totals"]["num_waiting"], found["totals"]["queue_s"]) == (4, 2.0)
    assert found["replicas"][0]["busy_share"] == 0.2, "each coordinator knows its own part"


def test_the_worst_word_about_a_replica_counts_and_says_why() -> None:
    one = SeenCluster(1, 2)
    one.states["expert-0-r0"] = ("dead", "exit code -9")
    one.standings["expert-0-r0"] = ("away", "connection refused")
    better = facts_of(SeenCluster(1, 2).reply()) | {"coordinator_id": "coordinator-1"}
    found = seen(read(one, coordinators=[facts_of(one.reply()), better]))
    row = found["replicas"][0]
    assert (row["state"], row["standing"]) == ("dead", "away")
    assert row["reasons"] == ["exit code -9", "coordinator-0: away, connection refused"]
    assert found["cluster"]["state"] == "degraded"
    assert found["copies"][0] == {"expert_id": 0, "ready": 0, "wanted": 1}


def test_a_standing_that_is_not_known_is_no_good_news() -> None:
    one = SeenCluster(1, 1)
    one.standings["expert-0-r0"] = ("haunted", "")
    row = seen(read(one))["replicas"][0]
    assert (row["standing"], row["reasons"]) == ("quarantined", ["coordinator-0: haunted"])


def test_without_a_supervisor_coordinators_tell_what_they_know() -> None:
    one = SeenCluster(2, 2)
    found = seen(read(one, status=None, status_age_s=float("inf")))
    assert (found["cluster"]["state"], found["cluster"]["age_s"], found["cluster"]["map_epoch"]) == ("unknown", None, 3)
    assert [(row["replica_id"], row["state"], row["standing"]) for row in found["replicas"]] == [
        ("expert-0-r0", "unknown", "healthy"),
        ("expert-1-r0", "unknown", "healthy"),
    ]
    assert found["load"]["num_layers"] == 2


def test_a_coordinator_that_is_silent_is_shown_as_the_supervisor_saw_it() -> None:
    one = SeenCluster()
    one.more["coordinators"] = [
        CoordinatorStatus(coordinator_id="coordinator-0", state="dead", pid=4711, detail="exit code -9"),
        CoordinatorStatus(coordinator_id="coordinator-1", state="loading"),
        CoordinatorStatus(coordinator_id="coordinator-2", state="ready", map_epoch=3),
    ]
    found = seen(read(one, coordinators=[]))
    assert [(row["coordinator_id"], row["state"]) for row in found["coordinators"]] == [
        ("coordinator-0", "dead"),
        ("coordinator-1", "loading"),
        ("coordinator-2", "silent"),
    ]
    assert found["coordinators"][0]["detail"] == "exit code -9"
    assert found["load"]["tokens"] == []
    assert found["load"]["mean_balancedness"] is None
    assert found["totals"]["kv_total"] == 0


def test_nothing_at_all_is_a_snapshot_too() -> None:
    found = seen(Reading(at_s=AT_S, clock_s=0.0))
    assert set(found) == FIELDS
    assert (found["replicas"], found["coordinators"], found["epochs"]) == ([], [], [])
    assert found["cluster"]["map_epoch"] is None


def test_epochs_are_told_with_when_they_were_seen_but_not_for_ever() -> None:
    one = SeenCluster()
    readings = []
    for epoch in (3, 3, 4, *range(5, 5 + MAX_EPOCHS)):
        one.more["map_epoch"] = epoch
        readings.append(read(one, len(readings)))
    assert seen(*readings[:3])["epochs"] == [{"epoch": 3, "at_s": AT_S}, {"epoch": 4, "at_s": AT_S + 2}]
    told = seen(*readings)["epochs"]
    assert len(told) == MAX_EPOCHS
    assert told[-1] == {"epoch": 4 + MAX_EPOCHS, "at_s": AT_S + len(readings) - 1}


# --- its size ---


def move(number: int, reason: str = "it is hot") -> dict[str, Any]:
    return {
        "kind": "copy",
        "what": f"expert {number}, layers 0-31",
        "node_id": "4f2a9c10" * 7,
        "source": "expert-1-r0",
        "num_bytes": 11_274_289_152,
        "reason": reason,
        "at": AT_S + number,
    }


def large(num_layers: int, num_experts: int, num_replicas: int) -> SeenCluster:
    """With every list full and every text long."""
    one = SeenCluster(num_layers, num_experts)
    one.load = load_of(num_layers, num_experts, tokens=4_000_000)
    long = "because " * 100
    rows = [replace(row, node="4f2a9c10" * 7) for row in one.status().replicas]
    rows = [replace(rows[n % len(rows)], replica_id=f"expert-{n % num_experts}-r{n}") for n in range(num_replicas)]
    many = [move(number, long) for number in range(64)]
    one.more = {
        "replicas": rows,
        "events": [f"12:00:00 {number} {long}" for number in range(64)],
        "balance": BalanceStatus(mode="on", policy="incremental", proposed=many, done=many, failed=many),
    }
    return one


@pytest.mark.parametrize(("num_experts", "most_kib"), [(8, 80), (64, 100)])
def test_a_large_cluster_is_a_small_message(num_experts: int, most_kib: int) -> None:
    found = seen(read(large(32, num_experts, num_replicas=100)))
    text = json.dumps(found, separators=(",", ":"))
    assert len(found["replicas"]) == 100
    assert len(found["load"]["tokens"]) == 32
    assert len(text) <= most_kib * 1024, f"{len(text)} bytes"


def test_what_is_too_much_is_left_out_and_counted_but_not_what_is_broken() -> None:
    one = large(2, 8, num_replicas=MAX_REPLICAS + 40)
    rows = one.more["replicas"]
    rows[-1] = replace(rows[-1], state="dead", detail="x" * 1000)
    found = seen(read(one))
    assert len(found["replicas"]) == MAX_REPLICAS
    assert found["left_out"] == {"replicas": 40, "coordinators": 0}
    assert found["replicas"][-1]["state"] == "dead"
    assert len(found["replicas"][-1]["reasons"][0]) == MAX_TEXT
    assert len(found["events"]) == MAX_EVENTS
    assert found["events"][-1].startswith("12:00:00 63 ")
    assert len(found["balance"]["failed"]) == MAX_MOVES
    assert found["balance"]["done"][-1]["at"] == AT_S + 63
    assert max(map(len, found["events"])) == len(found["balance"]["done"][0]["reason"]) == MAX_TEXT


def test_too_many_cells_are_not_sent() -> None:
    one = SeenCluster(1, 1)
    wide = LayerLoad(tokens=[1] * (MAX_CELLS + 1))
    found = seen(read(one, coordinators=[facts_of(one.reply()) | {"window_load": [list(wide.tokens)]}]))
    assert found["load"]["tokens"] == []
    assert found["load"]["num_experts"] == MAX_CELLS + 1
