"""What is shown while a cluster starts, when it gives up, and what its status looks like to people."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from actors.command.chat import ChatError
from actors.command.failures import one_line
from actors.command.progress import show_placement, watch_start
from actors.ray_runtime import ActorLost, RuntimeFailure
from actors.supervision.status import (
    ClusterStatus,
    CoordinatorStatus,
    CopiesStatus,
    LoadStatus,
    ReplicaStatus,
    render,
    size,
)

SILENT = ReplicaStatus(replica_id="expert-0-r0", expert_ids=[0], layers=[0, 3], state="starting")
EXPERT = replace(
    SILENT, state="ready", pid=7, node="node-aaaabbbb", address="[fe80::1]:5", kernel="fp16", weight_bytes=3 << 20
)
COORDINATOR = CoordinatorStatus(
    coordinator_id="coordinator-0", state="ready", node="node-aaaabbbb", kv_blocks_total=10, kv_block_size=32
)


def status(state: str, expert: ReplicaStatus, coordinator: CoordinatorStatus = COORDINATOR) -> ClusterStatus:
    return ClusterStatus(
        state=state,
        model="tiny [x]",
        model_path="/m/tiny",
        map_epoch=1,
        system_fingerprint="fp",
        uptime_s=1.0,
        coordinators=[coordinator],
        replicas=[expert],
        load=LoadStatus(
            tokens_per_expert=[5, 3],
            window_tokens_per_expert=[1, 0],
            balancedness_per_layer=[0.8],
            balancedness=0.8,
        ),
        events=["e"],
    )


def watch(statuses: Sequence[ClusterStatus], timeout_s: float = 60.0) -> tuple[ClusterStatus, str]:
    console = Console(file=io.StringIO(), width=200)
    left = iter(statuses)
    found = watch_start(lambda: next(left), console, timeout_s=timeout_s, poll_s=0.0)
    show_placement(found, console)
    return found, console.file.getvalue()  # type: ignore[attr-defined]


def test_everybody_is_named_once_with_size_and_address() -> None:
    half = replace(EXPERT, state="loading", loaded_bytes=1 << 20)
    found, text = watch([status("starting", SILENT), status("starting", half), status("ready", EXPERT)])
    assert found.state == "ready"
    assert text.count("expert-0-r0  ") == 1
    assert "3 MiB" in text
    assert "[fe80::1]:5" in text
    assert "node node-aaa: coordinator-0, expert-0-r0" in text
    assert "320 tokens" in text


@pytest.mark.parametrize("state", ["failed", "refused"])
def test_what_waiting_will_not_mend_ends_it(state: str) -> None:
    with pytest.raises(RuntimeFailure, match=f"expert-0-r0 {state}: bad weights"):
        watch([status("starting", SILENT), status("starting", replace(SILENT, state=state, detail="bad weights"))])


def test_a_replica_without_a_place_is_waited_for_a_little() -> None:
    unplaced = replace(SILENT, state="unplaced", detail="no room")
    assert watch([status("starting", unplaced), status("ready", EXPERT)])[0].state == "ready"


def test_too_late_names_who_is_missing() -> None:
    with pytest.raises(RuntimeFailure, match=r"not ready after 0 s: expert-0-r0 \(starting\)"):
        watch([status("starting", SILENT)], timeout_s=0.0)


def test_a_status_survives_its_json() -> None:
    one = status("ready", EXPERT)
    assert ClusterStatus.from_dict(json.loads(one.to_json())) == one
    assert ClusterStatus.from_dict(asdict(one)) == one


@pytest.mark.parametrize("expert", [SILENT, EXPERT])
def test_a_status_for_people(expert: ReplicaStatus) -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(status("ready", expert)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "tiny [x]: ready, map epoch 1, balancedness 0.80" in text
    assert "expert-0-r0" in text
    assert expert.address in text
    assert "since start" in text


@pytest.mark.parametrize(("queries", "hits", "shown"), [(0, 0, " - "), (200, 0, " 0% "), (200, 64, " 32% ")])
def test_the_share_of_prompts_that_was_cached(queries: int, hits: int, shown: str) -> None:
    console = Console(file=io.StringIO(), width=200)
    one = replace(
        status("ready", EXPERT).coordinators[0], prefix_queries_tokens_total=queries, prefix_hits_tokens_total=hits
    )
    console.print(render(replace(status("ready", EXPERT), coordinators=[one])))
    row = next(line for line in console.file.getvalue().splitlines() if "coordinator-0" in line)  # type: ignore[attr-defined]
    assert f"0/10 x 32 {shown}" in row


def test_copies_that_lack_are_shown_and_the_last_events() -> None:
    console = Console(file=io.StringIO(), width=200)
    copies = [CopiesStatus(expert_id=0, ready=2, wanted=2), CopiesStatus(expert_id=1, ready=1, wanted=2)]
    events = [f"event [{number}]" for number in range(9)]
    console.print(render(replace(status("degraded", EXPERT), copies=copies, events=events)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "copies: expert 1 has 1 of 2\n" in text
    assert [line.strip() for line in text.splitlines() if "event" in line] == events[-5:]


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 1536, 3 << 20, 5 << 29)] == ["0 KiB", "1.5 KiB", "3 MiB", "2.5 GiB"]


def test_failures_are_one_line() -> None:
    assert one_line(RuntimeFailure("first\nsecond")) == "first"
    assert one_line(ActorLost("gone")) == "gone"
    assert one_line(ChatError("")) == "ChatError"
    assert one_line(KeyError("x")).startswith("internal error: KeyError: 'x' (OCTAVO_TRACEBACK=1")
