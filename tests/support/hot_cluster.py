"""Three Ray nodes on this machine, and on them a throttled cluster under the real supervisor, as commands find it."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from actors import ray_runtime
from actors.supervision.blueprint import process_env
from actors.supervision.client import SUPERVISOR_NAME, SupervisorClient
from actors.supervision.status import ClusterStatus
from cluster.config import ClusterConfig
from tests.support.ray_nodes import PatientCluster
from tests.support.served_cluster import NAMESPACE
from tests.support.throttled import ROW_COSTS_US, ThrottledSupervisor

TOKEN = "a-token-of-the-tests"
OBJECT_STORE_BYTES = 128 * 1024 * 1024
CPUS = 4
"""Of a node: its experts sleep beside each other, each as if it had a device of its own."""
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class HotCluster:
    """`address` is Ray's; `supervisor` the real one."""

    address: str
    supervisor: SupervisorClient

    def until(self, holds: Callable[[ClusterStatus], bool], timeout_s: float) -> ClusterStatus:
        """The first status for which it holds."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            status = self.supervisor.status()
            if holds(status):
                return status
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not within {timeout_s:g} s: {status}")
            time.sleep(0.2)


def memory_of(status: ClusterStatus) -> int:
    """Resident bytes of the expert processes that are there."""
    found = 0
    for one in status.replicas:
        if one.pid and psutil.pid_exists(one.pid):
            found += psutil.Process(one.pid).memory_info().rss
    return found


@contextmanager
def hot_cluster(config: ClusterConfig, row_us: float = ROW_COSTS_US) -> Iterator[HotCluster]:
    """Starts the nodes and the cluster, and ends both. A row takes an expert `row_us`, asleep."""
    let_workers_find_us()
    nodes = PatientCluster(
        initialize_head=True,
        head_node_args={"num_cpus": CPUS, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False},
    )
    for _ in range(2):
        nodes.add_node(num_cpus=CPUS, object_store_memory=OBJECT_STORE_BYTES)
    try:
        with throttled(str(nodes.address), config, row_us) as cluster:
            yield cluster
    finally:
        nodes.shutdown()


@contextmanager
def throttled(address: str, config: ClusterConfig, row_us: float = ROW_COSTS_US) -> Iterator[HotCluster]:
    """Starts the cluster on a Ray that is there, and ends it."""
    ray_runtime.connect(address, NAMESPACE)
    try:
        actor = ray_runtime.spawn(
            ThrottledSupervisor,
            name=SUPERVISOR_NAME,
            namespace=NAMESPACE,
            kwargs={"config": config, "row_us": row_us},
            env=process_env(threads=1),
            on_head=True,
        )
        supervisor = SupervisorClient(actor)
        try:
            yield HotCluster(address, supervisor)
        finally:
            supervisor.retire()
    finally:
        ray_runtime.disconnect()


def let_workers_find_us() -> None:
    """Ray's workers import the throttled classes, and are no nicer than `octavo serve` has them; before Ray starts."""
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ.setdefault("RAY_worker_niceness", "0")
