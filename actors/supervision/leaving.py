"""A node that is about to go, as when its pod is ended: its work goes elsewhere first, as far as room and time allow.

Experts are copied before they end, coordinators finish what they have; both are their keepers' work. Who says that a
node goes, and ends it afterwards, is outside.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable

from actors.supervision.keepers import CoordinatorKeeper, Say
from actors.supervision.mover import Mover
from cluster.desired_set import MoveRefused
from cluster.ids import NodeId
from cluster.placement import NodeSlots

MARK_S = 120.0
"""A node that is there so long after its time is one like the others again."""


class Leaving:
    """The nodes of one cluster that are about to go. `look` is called in every round of the supervisor."""

    def __init__(
        self, mover: Mover, coordinators: CoordinatorKeeper, say: Say, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._mover = mover
        self._experts = mover.experts
        self._coordinators = coordinators
        self._say = say
        self._clock = clock
        self._until_s: dict[NodeId, float] = {}

    def look(self) -> None:
        """Nothing new is started on those that are marked."""
        now_s = self._clock()
        self._until_s = {node_id: until_s for node_id, until_s in self._until_s.items() if now_s < until_s}
        self._experts.leaving = self._coordinators.leaving = frozenset(self._until_s)

    async def drain(self, node_id: str, slots: tuple[NodeSlots, ...], drain_s: float) -> list[str]:
        """Moves what runs on a node of `slots`; names of the processes that are there still after `drain_s` seconds.

        Raises MoveRefused for a node that is not there.
        """
        if all(node_id != one.node_id for one in slots):
            raise MoveRefused(f"there is no node {node_id!r}")
        leaving = NodeId(node_id)
        self._until_s[leaving] = self._clock() + drain_s + MARK_S
        self.look()
        self._say(f"node {node_id[:8]} is about to go")
        self._move_experts(leaving)
        self._stop_coordinators(leaving, drain_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                while self._left(leaving):
                    await self._experts.looked.wait()
        return self._left(leaving)

    def _move_experts(self, leaving: NodeId) -> None:
        experts = self._experts
        if all(node.node_id in experts.leaving for node in experts.nodes):
            return  # whoever may take them is about to go, too: here they serve until the end
        places = self._mover.ground.places
        experts.change(experts.desired.moved_off(leaving, places, self._mover.taken))

    def _stop_coordinators(self, leaving: NodeId, drain_s: float) -> None:
        for view in self._coordinators.views.values():
            if view.node_id == leaving and view.dead is None and view.state != "draining":
                self._coordinators.fleet.stop_later(view.process_id, view.incarnation, drain_s=drain_s)

    def _left(self, leaving: NodeId) -> list[str]:
        views = (*self._experts.views.values(), *self._coordinators.views.values())
        return sorted(view.process_id for view in views if view.node_id == leaving and view.dead is None)
