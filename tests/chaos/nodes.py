"""A chaos cluster on several Ray nodes, of which one can be lost, and the head as well: rows about whole machines."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from ray._private.node import Node

from tests.chaos.clusters import MODEL_ID, ServedChaos
from tests.support.ray_nodes import RayNodes
from tests.support.served_cluster import ServedCluster


@dataclass(frozen=True)
class OnNodes:
    """Needs Ray nodes, a head and `workers` others, which outlive their head; `octavo serve` joins them.

    Four experts share a process, so that losing a node of one process is losing four experts.
    """

    workers: int = 3
    options: tuple[str, ...] = ("--replicas", "2", "--experts-per-actor", "4")

    @asynccontextmanager
    async def open(self, model: Path, home: Path) -> AsyncIterator["NodesChaos"]:
        """Nodes first. All in the main thread, as for `tests.chaos.clusters.Served`."""
        nodes = RayNodes(self.workers)
        try:
            options = ("--address", nodes.address, "--served-model-name", MODEL_ID, *self.options)
            served = ServedCluster(home, model, *options)
            try:
                yield NodesChaos(served, nodes)
            finally:
                served.stop()
        finally:
            nodes.close()


class NodesChaos(ServedChaos):
    """`octavo serve` on `nodes`."""

    def __init__(self, served: ServedCluster, nodes: RayNodes) -> None:
        self.nodes = nodes
        super().__init__(served)

    def processes(self, title: str) -> list[psutil.Process]:
        """See ServedChaos: here they are children of raylets, not of the command."""
        pids = [pid for node in (self.nodes.head, *self.nodes.workers) for pid in self.nodes.pids(node)]
        return [psutil.Process(pid) for pid in pids if _title(pid).startswith(title)]

    async def expendable(self) -> Node:
        """A node that holds experts and nothing that there is only one of: no coordinator, no front door."""
        status = await self.status()
        needed = {one.pid for one in status.coordinators} | {one.pid for one in self.processes("ray::ServeReplica")}
        held = {one.pid for one in status.replicas}
        for node in self.nodes.workers:
            pids = set(self.nodes.pids(node))
            if pids & held and not pids & needed:
                return node
        raise AssertionError("every node holds a coordinator or the front door")


def _title(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""
