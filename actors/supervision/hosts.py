"""Asks Ray for nodes that hold experts, and gives them back: `HostControl` over Ray's autoscaler.

What is asked for is a level (`cluster.hosts_wanted`), told again after every change, after a failure with a growing
pause, and every now and then, since Ray's head forgets it. A node goes when nothing runs on it any more, by the
autoscaler's own idle timeout. Whether there should be more or fewer is the balancing policy's decision.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial

from actors.ray_runtime import RuntimeFailure
from actors.supervision.host_control import HostControlError
from actors.supervision.runtime import Runtime
from cluster.hosts_wanted import HostLimits, HostsRefused, HostsWanted, begin
from cluster.ids import NodeId
from cluster.placement import EXPERT_HOST, NodeSlots
from cluster.retries import Pauses

REPEAT_S = 30.0
"""A level that was told is told again after so long: Ray's head may be another one, or somebody else has told it."""
PAUSE_S, MAX_PAUSE_S = 2.0, 60.0
PATIENCE_S = 1.0
"""How long a round of the supervisor waits for the head; the answer is looked for in every later one."""

_TELL = "tell"


class RayHosts:
    """Nodes with the resource `EXPERT_HOST`, within limits. Used from the supervisor's event loop only.

    `look` is called in every round of the supervisor; the others are `HostControl`. `say` gets what people should
    know. Nobody waits for Ray's head: what could not be told is told later.
    """

    def __init__(
        self,
        runtime: Runtime,
        limits: HostLimits,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runtime = runtime
        self._limits = limits
        self._say = say
        self._clock = clock
        self._wanted: HostsWanted | None = None
        self._present: frozenset[NodeId] = frozenset()
        self._told: tuple[int, frozenset[NodeId]] | None = None
        self._told_s = 0.0
        self._telling: asyncio.Future[None] | None = None
        self._pauses: Pauses[str] = Pauses(PAUSE_S, MAX_PAUSE_S)

    @property
    def level(self) -> int:
        """Hosts that are wanted in all; 0 before the first look."""
        return 0 if self._wanted is None else self._wanted.level

    @property
    def leaving(self) -> frozenset[NodeId]:
        """Hosts that were given back and are still there: nothing may be started on them."""
        return frozenset() if self._wanted is None else self._wanted.leaving

    @property
    def draining(self) -> frozenset[NodeId]:
        """Hosts that get nothing new."""
        return frozenset() if self._wanted is None else self._wanted.draining

    async def look(self, nodes: Iterable[NodeSlots], *, head_silent: bool = False, lost: Collection[str] = ()) -> None:
        """Takes note of the hosts that are there, and tells Ray the level if it is time to."""
        if head_silent:
            self._told = None  # who comes back may be another one
            return
        self._present = frozenset(one.node_id for one in nodes if EXPERT_HOST in one.roles and one.node_id not in lost)
        now_s = self._clock()
        if self._wanted is None:
            self._wanted = begin(self._present, self._limits)
        before = self._wanted
        self._wanted, given_up = before.settled(self._present, now_s, self._limits)
        if given_up:
            self._say(f"{given_up} hosts for experts have not come in {self._limits.timeout_s:.0f} s")
        await self._tell(now_s)

    async def add(self, num: int) -> None:
        """Asks for so many more hosts, as far as the limit allows. Raises HostControlError."""
        self._change(partial(self._state.add, num, self._present, self._clock(), self._limits))
        self._say(f"{self.level} hosts for experts are wanted, {self._state.usable(self._present)} are there")
        await self._tell(self._clock())

    async def drain(self, node_id: str) -> None:
        """This host gets nothing new from now on. Raises HostControlError for one that is not there."""
        if node_id not in self._present:
            raise HostControlError(f"there is no host {node_id}")
        self._change(partial(self._state.drain, NodeId(node_id)))

    async def keep(self, node_id: str) -> None:
        """It does again, also when it was given back and has not gone yet. Raises HostControlError."""
        self._change(partial(self._state.keep, NodeId(node_id), self._limits))
        await self._tell(self._clock())

    async def remove(self, node_id: str) -> None:
        """Gives back a host that holds nothing; Ray ends it when it was idle for long. Raises HostControlError."""
        was_leaving = node_id in self.leaving
        self._change(partial(self._state.remove, NodeId(node_id), self._present, self._limits))
        if not was_leaving:
            self._say(f"host {node_id[:8]} is given back; {self.level} hosts for experts are wanted")
        await self._tell(self._clock())

    async def pending(self) -> int:
        """Hosts that are asked for and have not come."""
        return 0 if self._wanted is None else self._wanted.pending(self._present)

    @property
    def _state(self) -> HostsWanted:
        if self._wanted is None:
            raise HostControlError("which hosts there are is not known yet")
        return self._wanted

    def _change(self, change: Callable[[], HostsWanted]) -> None:
        try:
            self._wanted = change()
        except HostsRefused as error:
            raise HostControlError(str(error)) from None

    async def _tell(self, now_s: float) -> None:
        """Tells Ray the level if it is another one or was told long ago; not while a failure is recent."""
        self._hear()
        wanted = (self._state.level, self.leaving)
        is_due = wanted != self._told or now_s - self._told_s >= REPEAT_S
        if not is_due or self._telling is not None or _TELL in self._pauses.paused(now_s):
            return
        call = partial(self._runtime.request_nodes, wanted[0], EXPERT_HOST, wanted[1])
        self._telling = asyncio.ensure_future(self._runtime.aside(call))
        self._told, self._told_s = wanted, now_s
        await asyncio.wait({self._telling}, timeout=PATIENCE_S)
        self._hear()

    def _hear(self) -> None:
        """How the last telling went, if that is known."""
        if self._telling is None or not self._telling.done():
            return
        telling, self._telling = self._telling, None
        try:
            telling.result()
            self._pauses = Pauses(PAUSE_S, MAX_PAUSE_S)
        except RuntimeFailure as error:
            self._told = None
            self._pauses = self._pauses.failed([_TELL], self._clock())
            self._say(str(error))
