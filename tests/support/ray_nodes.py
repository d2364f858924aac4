"""Several Ray nodes on one machine, whose head can be killed and brought back: what a cluster of machines goes through.

Ray's head keeps its state in its embedded RocksDB, and nobody gives up on a head that is away for ten minutes.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._private import services
from ray._private.node import Node
from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 128 * 1024 * 1024
HEAD_RECONNECT_S = 600
NODE_S = 240.0


class PatientCluster(Cluster):
    """Ray's own, which gives each node 30 s to come: a busy machine may need them several times."""

    def add_node(self, *arguments: Any, **options: Any) -> Node:
        """One more node, the head if it is the first."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(services, "get_node", _patiently(services.get_node))
            return super().add_node(*arguments, **options)

    def _wait_for_node(self, node: Node, timeout: float = NODE_S) -> None:
        super()._wait_for_node(node, timeout)


def _patiently(get_node: Callable[..., Any]) -> Callable[..., Any]:
    """Asks again and again; it raises RuntimeError where the head knows of no such node yet."""

    def patient(*arguments: Any, **options: Any) -> Any:
        deadline_s = time.monotonic() + NODE_S
        while True:
            try:
                return get_node(*arguments, **options)
            except RuntimeError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.2)

    return patient


class RayNodes:
    """A head and `workers` more nodes, each a raylet with its own processes. `close` ends them all."""

    def __init__(self, workers: int) -> None:
        self._storage = tempfile.TemporaryDirectory(prefix="octavo-gcs-")
        config = {
            "gcs_storage": "rocksdb",
            "gcs_storage_path": str(Path(self._storage.name)),
            "gcs_rpc_server_reconnect_timeout_s": HEAD_RECONNECT_S,
        }
        arguments: dict[str, Any] = {
            "num_cpus": 4,  # more than the others have: that makes it the coordinator's place
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,  # Ray's dashboard burns a core while the head is away
            "_system_config": config,
        }
        self._cluster = PatientCluster(initialize_head=True, head_node_args=arguments)
        self._address = str(self._cluster.address)
        for _ in range(workers):
            self.add()

    @property
    def address(self) -> str:
        """Of the head, also while it is away."""
        return self._address

    def add(self) -> Node:
        """One more node."""
        return self._cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)

    @property
    def head(self) -> Node:
        """The node of the head."""
        return self._cluster.head_node

    @property
    def workers(self) -> list[Node]:
        """All nodes but the head's, by id."""
        return sorted(self._cluster.worker_nodes, key=lambda node: str(node.node_id))

    def pids(self, node: Node) -> list[int]:
        """The processes of a node: its raylet and everybody that it started."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return [raylet.pid, *(child.pid for child in raylet.children(recursive=True))]

    def remove(self, node: Node) -> None:
        """SIGKILL to everybody on that node at once, the raylet first: nobody says goodbye."""
        for pid in self.pids(node):
            try:
                psutil.Process(pid).kill()
            except psutil.NoSuchProcess:
                continue
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_head(self) -> None:
        """SIGKILL to the head's process; its node and everybody on it stay."""
        self._cluster.head_node.kill_gcs_server()

    def revive_head(self) -> None:
        """The head again, at the same address and with its old state."""
        self._cluster.head_node.start_gcs_server()

    def close(self) -> None:
        """Ends all nodes."""
        self._cluster.shutdown()
        self._storage.cleanup()
