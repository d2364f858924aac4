"""A Ray cluster of two nodes that was there before: octavo joins it, spreads over it, and leaves it as it was."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ray_nodes import PatientCluster
from tests.support.served_cluster import ServedCluster, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture
def two_nodes() -> Iterator[PatientCluster]:
    """Two raylets on this machine; each is a node to Ray."""
    memory = 128 * 1024 * 1024
    nodes = PatientCluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": memory})
    nodes.add_node(num_cpus=1, object_store_memory=memory)
    yield nodes
    nodes.shutdown()


def test_experts_spread_and_their_copies_are_apart(two_nodes: PatientCluster, tmp_path: Path, tiny_model: Path) -> None:
    options = ("--address", two_nodes.address, "--experts-per-actor", "4", "--replicas", "2")
    served = ServedCluster(tmp_path, tiny_model, *options)
    try:
        shown = run(["status", "--json", "--address", two_nodes.address], served.env)
        status = json.loads(shown.stdout)
        nodes = {one["replica_id"]: one["node"] for one in status["replicas"]}
        assert len(nodes) == 4
        assert len(set(nodes.values())) == 2
        assert nodes["experts-0-3-r0"] != nodes["experts-0-3-r1"]
        assert nodes["experts-4-7-r0"] != nodes["experts-4-7-r1"]
        reply = served.client().completions.create(model="tiny", prompt="Hello", max_tokens=4, temperature=0)
        assert reply.usage is not None
        assert reply.usage.completion_tokens <= 4
        second = run(["serve", str(tiny_model), "--port", "1", "--address", two_nodes.address], served.env)
        assert second.returncode == 1
    finally:
        assert served.stop() == 0
    gone = run(["status", "--address", two_nodes.address], served.env)
    assert gone.returncode == 1
    assert "no octavo cluster" in gone.stderr
