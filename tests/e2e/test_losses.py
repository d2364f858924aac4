"""A node, Ray's head and the supervisor are lost, on real Ray: answers stay the same, and what was lost comes back."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from ray._private.node import Node

from actors.ray_runtime import RuntimeFailure
from actors.supervision.status import ClusterStatus
from tests.support.ray_nodes import RayNodes
from tests.support.served_cluster import ServedCluster, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

PROMPTS = ("The door of the house", "The roof of the house", "A window of the house")
BACK_S = 200.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """A head and three others: one for each of four processes with experts."""
    nodes = RayNodes(workers=3)
    yield nodes
    nodes.close()


@pytest.fixture(scope="module")
def served(nodes: RayNodes, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[ServedCluster]:
    """Two copies of every expert, four experts to a process."""
    options = ("--address", nodes.address, "--replicas", "2", "--experts-per-actor", "4")
    served = ServedCluster(tmp_path_factory.mktemp("home"), tiny_model, *options)
    yield served
    served.stop()


def until(
    look: Callable[[], ClusterStatus], holds: Callable[[ClusterStatus], bool], timeout_s: float = BACK_S
) -> ClusterStatus:
    deadline = time.monotonic() + timeout_s
    found: ClusterStatus | str = ""
    while time.monotonic() < deadline:
        try:
            found = look()
        except RuntimeFailure as error:
            found = str(error)
        if isinstance(found, ClusterStatus) and holds(found):
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {timeout_s:g} s: {found}")


def ready(status: ClusterStatus) -> bool:
    pids = [one.pid for one in (*status.replicas, *status.coordinators)]
    return status.state == "ready" and all(psutil.pid_exists(pid) for pid in pids)


def answers(served: ServedCluster) -> list[str]:
    """What every prompt gets, all at once."""

    def one(prompt: str) -> str:
        asked = {"max_tokens": 48, "temperature": 0, "extra_body": {"ignore_eos": True}}
        return str(served.client().completions.create(model="tiny", prompt=prompt, **asked).choices[0].text)  # type: ignore[call-overload]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(one, PROMPTS))


def test_an_expert_dies_while_the_head_is_away(nodes: RayNodes, served: ServedCluster) -> None:
    first = until(served.status, ready)
    expected = answers(served)
    supervisor = served.supervisor()
    supervisor.status()
    nodes.kill_head()
    try:
        assert answers(served) == expected
        os.kill(first.replicas[0].pid, signal.SIGKILL)
        for _ in range(3):
            assert answers(served) == expected
        until(supervisor.status, lambda status: any("Ray's head does not answer" in one for one in status.events))
        assert answers(served) == expected
    finally:
        nodes.revive_head()
    after = until(served.status, lambda status: ready(status) and status.replicas[0].pid != first.replicas[0].pid)
    assert [one.pid for one in after.replicas[1:]] == [one.pid for one in first.replicas[1:]]
    assert any("have 1 of 2 copies" in event for event in after.events)
    assert any("have 2 of 2 copies again after" in event for event in after.events)
    assert answers(served) == expected


def test_a_new_supervisor_finds_what_runs(nodes: RayNodes, served: ServedCluster) -> None:
    first = until(served.status, ready)
    expected = answers(served)
    (supervisor,) = [pid for pid in nodes.pids(nodes.head) if title(pid).startswith("ray::Supervisor")]
    killed_s = time.monotonic()
    os.kill(supervisor, signal.SIGKILL)
    assert answers(served) == expected
    shown = run(["status", "--json", "--address", nodes.address], served.env)
    assert shown.returncode == 0 or "the supervisor is away" in shown.stderr, shown.stderr
    after = until(served.status, lambda now: ready(now) and now.uptime_s < time.monotonic() - killed_s)
    assert [one.pid for one in after.replicas] == [one.pid for one in first.replicas]
    assert [one.pid for one in after.coordinators] == [one.pid for one in first.coordinators]
    assert after.map_epoch >= first.map_epoch
    assert answers(served) == expected


def test_a_node_is_lost_without_a_word(nodes: RayNodes, served: ServedCluster) -> None:
    first = until(served.status, ready)
    expected = answers(served)
    coordinators = {one.node for one in first.coordinators}
    (node, *_) = [node for node in nodes.workers if node.node_id not in coordinators and not has_front(nodes, node)]
    held = {one.replica_id for one in first.replicas if one.node == node.node_id}
    assert held
    nodes.remove(node)
    assert answers(served) == expected
    after = until(served.status, lambda now: ready(now) and all(one.node != node.node_id for one in now.replicas))
    assert {one.replica_id for one in after.replicas if one not in first.replicas} >= held
    assert json.loads(after.to_json())["copies"] == [{"expert_id": e, "ready": 2, "wanted": 2} for e in range(8)]
    assert answers(served) == expected


def has_front(nodes: RayNodes, node: Node) -> bool:
    """True for a node that has a replica of the front door, whose streams would be cut."""
    return any(title(pid).startswith("ray::ServeReplica") for pid in nodes.pids(node))


def title(pid: int) -> str:
    """What a process calls itself."""
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""
