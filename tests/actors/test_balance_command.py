"""What `octavo balance` and `octavo experts` show and how they wait, over scripted statuses."""

import dataclasses
from typing import Any

import pytest
from rich.console import Console

from actors.command.balance import _all_gone, _all_ready, _layers, moves_table, switch
from actors.ray_runtime import RuntimeFailure
from actors.supervision.status import BalanceStatus, ClusterStatus, CoordinatorStatus, LoadStatus, ReplicaStatus, render
from cluster.config import ConfigError

MOVE = {"kind": "copy", "what": "expert 3", "node_id": "0123456789", "source": "", "num_bytes": 3 << 20}


def status(*replicas: ReplicaStatus, epoch: int = 5, **changes: Any) -> ClusterStatus:
    parts: dict[str, Any] = {
        "state": "ready",
        "model": "tiny",
        "model_path": "/m",
        "map_epoch": 5,
        "system_fingerprint": "fp_0",
        "uptime_s": 1.0,
        "coordinators": [CoordinatorStatus(coordinator_id="coordinator-0", map_epoch=epoch)],
        "replicas": list(replicas),
        "load": LoadStatus(
            tokens_per_expert=[1], window_tokens_per_expert=[1], balancedness_per_layer=[1.0], balancedness=1.0
        ),
        "events": [],
    }
    return ClusterStatus(**{**parts, **changes})


def row(name: str, state: str = "ready", detail: str = "") -> ReplicaStatus:
    return ReplicaStatus(replica_id=name, expert_ids=[0], layers=[0, 1], state=state, detail=detail)


def shown(what: Any) -> str:
    console = Console(width=200, highlight=False)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


def test_moves_are_shown_with_what_they_are_for() -> None:
    found = {
        "moves": [{**MOVE, "reason": "n0 is [busy]", "at": 0.0}],
        "moved_bytes": 3 << 20,
        "busiest_share_before": 0.9,
        "busiest_share_after": 0.5,
        "balancedness_before": 0.4,
        "balancedness_after": 0.8,
    }
    text = shown(moves_table(found, dry_run=True))
    assert "moves that balancing would make" in text
    for words in ("copy", "expert 3", "01234567 ", "disk", "3 MiB", "n0 is [busy]"):
        assert words in text
    assert "balancedness 0.40 -> 0.80, busiest hosts 90.0% -> 50.0% of the time, 3 MiB to load" in text


def test_the_status_tells_of_balancing_where_there_is_any() -> None:
    assert "balancing" not in shown(render(status()))
    failed = [{**MOVE, "reason": "", "at": 0.0, "error": "the node is gone"}]
    balance = BalanceStatus(mode="dry_run", policy="incremental", failed=failed, moves_total=2, moved_bytes_total=1024)
    text = shown(render(status(balance=balance)))
    assert "balancing: dry run, policy incremental, 2 moves, 1 KiB loaded, last failure: the node is gone" in text


def test_a_status_survives_its_json() -> None:
    balance = BalanceStatus(mode="on", policy="eplb", done=[dict(MOVE)])
    one = status(row("a"), balance=balance)
    assert ClusterStatus.from_dict(dataclasses.asdict(one)) == one
    old = {name: value for name, value in dataclasses.asdict(one).items() if name != "balance"}
    assert ClusterStatus.from_dict(old).balance == BalanceStatus()


def test_waiting_ends_when_all_is_there_and_known() -> None:
    assert _all_ready(status(row("a")), {"a"}) is None
    assert _all_ready(status(row("a", "loading")), {"a"}) == "a is loading"
    assert _all_ready(status(row("a"), epoch=4), {"a"}) == "a coordinator has an older map"
    with pytest.raises(RuntimeFailure, match="a is unplaced: no room"):
        _all_ready(status(row("a", "unplaced", "no room")), {"a"})
    with pytest.raises(RuntimeFailure, match="a is not wanted any more"):
        _all_ready(status(), {"a"})
    assert _all_gone(status(row("a", "draining")), {"a"}) == "a is still there"
    assert _all_gone(status(row("b")), {"a"}) is None


def test_layers_and_modes_are_read() -> None:
    assert _layers("0-15") == (0, 15)
    assert _layers("7") == (7, 7)
    for wrong in ("", "a-b", "3-", "-3", "1-2-3"):
        with pytest.raises(ConfigError, match="layers is"):
            _layers(wrong)
    with pytest.raises(ConfigError, match="mode is 'maybe', but must be one of off, dry_run, on"):
        switch(None, "octavo", "maybe")
