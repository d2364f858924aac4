"""The cluster's nodes, as far as can be known now: what Ray's head said last, and who answers.

The head may be away for minutes, and notices a lost node only after as long: neither may hold the supervisor up. What
follows for processes is decided in `cluster.placement` and `cluster.liveness`.
"""

import asyncio

from actors.ray_runtime import RayNode, RuntimeFailure
from actors.supervision.runtime import Runtime
from cluster.ids import NodeId
from cluster.placement import NodeSlots

PATIENCE_S = 2.0
PROBE_WAIT_S = 0.3


class NodeWatch:
    """`slots` are the nodes that the head listed last; `head_silent` says that it has not answered since.

    `lost` are nodes of the list that took no connection when they were last asked.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.slots: tuple[NodeSlots, ...] = ()
        self.head_silent = False
        self.lost: frozenset[NodeId] = frozenset()
        self._runtime = runtime
        self._nodes: tuple[RayNode, ...] = ()
        self._asking: asyncio.Future[tuple[RayNode, ...]] | None = None
        self._probing: asyncio.Future[frozenset[str]] | None = None

    def address(self, node_id: str | None) -> str:
        """Where others reach that node; loopback for one that is not listed, where nobody else looks."""
        return next((node.address for node in self._nodes if node.node_id == node_id), "127.0.0.1")

    def role(self, node_id: str | None, role: str) -> str | None:
        """That role, if the node was started for it; None for one that takes everybody."""
        return role if any(one.node_id == node_id and role in one.roles for one in self.slots) else None

    async def look(self) -> None:
        """Asks the head and every node. Answers that take longer than a moment are left to the next look."""
        await self._ask_head()
        await self._probe()

    async def _ask_head(self) -> None:
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._runtime.aside(self._runtime.nodes))
        patience_s = 0.0 if self.head_silent else PATIENCE_S  # once is enough: the answer is looked for every round
        await asyncio.wait({self._asking}, timeout=patience_s)
        if not self._asking.done():
            self.head_silent = True
            return
        asked, self._asking = self._asking, None
        try:
            nodes = asked.result()
        except RuntimeFailure:
            nodes = ()
        self.head_silent = not nodes
        if nodes:
            self._nodes = nodes
            self.slots = tuple(_slots(node) for node in nodes)

    async def _probe(self) -> None:
        if len(self._nodes) < 2:  # where there is one node, who asks is on it
            self.lost = frozenset()
            return
        if self._probing is None:
            self._probing = asyncio.ensure_future(self._runtime.unreachable(self._nodes))
        await asyncio.wait({self._probing}, timeout=PROBE_WAIT_S)
        if self._probing.done():
            probed, self._probing = self._probing, None
            self.lost = frozenset(NodeId(node_id) for node_id in probed.result())


def _slots(node: RayNode) -> NodeSlots:
    return NodeSlots(
        node_id=NodeId(node.node_id),
        gpu=node.num_gpus,
        cpu=node.num_cpus,
        memory_bytes=node.memory_bytes,
        labels=node.labels,
        roles=node.roles,
        address=node.address,
    )
