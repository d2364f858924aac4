"""Carries out one balancing action at a time: changes what is desired, and waits until that is so.

Copy before switch, draining and ending are `cluster.reconcile`'s; which actions there are, a policy's or a person's.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection

from actors.supervision.host_control import HostControl, HostControlError
from actors.supervision.keepers import HOPELESS_FAILURES, ExpertKeeper
from cluster.desired_set import DesiredSet, MoveRefused
from cluster.ids import NodeId, ReplicaId
from cluster.layout import Grain, Layout
from cluster.live_layout import Ground, copy_unit, drop_unit, layout_of
from cluster.policy import Action, AddHosts, Copy, DrainHost, Drop, KeepHost, RemoveHost

START_S = 120.0
SLOWEST_BYTES_PER_S = 10_000_000
HOST_CALL_S = 30.0


class MoveFailed(Exception):
    """An action that was not done, and why. What it had begun is taken back."""


class Mover:
    """`bytes_per_s` is how fast copies are allowed to load, None where nobody limits it.

    `draining` are nodes that give up what they have. `speeds` are what was last measured. A process uses `cpus_each`.
    """

    def __init__(
        self,
        experts: ExpertKeeper,
        grain: Grain,
        hosts: HostControl,
        *,
        drain_s: float,
        expert_slots: int | None = None,
        bytes_per_s: int | None = None,
        cpus_each: float = 1.0,
    ) -> None:
        self.experts = experts
        self.grain = grain
        self.draining: frozenset[NodeId] = frozenset()
        self.speeds: dict[NodeId, float] = {}
        self._hosts = hosts
        self._drain_s = drain_s
        self._expert_slots = expert_slots
        self._cpus_each = cpus_each
        self._known = experts.desired
        self._rate = min(bytes_per_s or SLOWEST_BYTES_PER_S, SLOWEST_BYTES_PER_S)

    @property
    def ground(self) -> Ground:
        """Where replicas are and may be."""
        told = {one.replica_id: one.node_id for one in self.experts.desired.replicas if one.node_id is not None}
        return Ground(
            nodes=self.experts.nodes,
            places={**told, **self.experts.places},  # who was added since the last round is not placed yet
            draining=self.draining | self.experts.leaving,
            expert_slots=self._expert_slots,
            speeds=self.speeds,
            cpus_each=self._cpus_each,
        )

    @property
    def layout(self) -> Layout:
        """Who should hold what, where, on the nodes that answer."""
        return layout_of(self.experts.desired, self.grain, self.ground)

    def machine(self, node_id: NodeId) -> str:
        """What that node shares with others of the same answer: processors and memory."""
        return next((node.address for node in self.experts.nodes if node.node_id == node_id), "") or node_id

    @property
    def taken(self) -> set[ReplicaId]:
        """Ids of replicas that are not desired any more and yet there."""
        return {*map(ReplicaId, self.experts.views), *map(ReplicaId, self.experts.state.records)}

    def expect_no_change(self) -> None:
        """From now on `others_changed` tells."""
        self._known = self.experts.desired

    @property
    def others_changed(self) -> bool:
        """True when what is desired is not what actions have made it: a person or a lost node has."""
        return self.experts.desired is not self._known

    async def do(self, action: Action) -> None:
        """Returns when it is done. Raises MoveFailed."""
        try:
            match action:
                case Copy():
                    await self._copy(action)
                case Drop():
                    await self._drop(action)
                case _:
                    await self._ask_hosts(action)
        except MoveRefused as error:
            raise MoveFailed(str(error)) from None

    def _change(self, desired: DesiredSet) -> None:
        alone = not self.others_changed
        self.experts.change(desired)
        if alone:
            self._known = desired

    async def _copy(self, action: Copy) -> None:
        experts = self.experts
        desired, made = copy_unit(experts.desired, action, self.ground, self.grain, self.taken)
        self._change(desired)
        try:
            await self._until(lambda: self.serves(made), START_S + 2 * action.num_bytes / self._rate, [made])
        except MoveFailed:
            self._change(experts.desired.without([made]))
            raise

    async def _drop(self, action: Drop) -> None:
        experts = self.experts
        desired, gone, made = drop_unit(experts.desired, action, self.ground, self.grain, self.taken)
        before = experts.desired
        self._change(desired)
        held = sum(one.num_layers * len(one.expert_ids) for one in before.replicas if one.replica_id in gone)
        loads_s = START_S + 2 * held * self.grain.layer_bytes / self._rate if made else 0.0
        try:
            await self._until(lambda: all(map(self.is_gone, gone)), loads_s + self._drain_s + START_S, made)
        except MoveFailed:
            if all(not self.is_gone(one) for one in gone):  # they serve still: then they are to stay
                back = tuple(one for one in before.replicas if one.replica_id in gone)
                self._change(experts.desired.without(made).with_more(back))
            raise

    async def _ask_hosts(self, action: Action) -> None:
        try:
            async with asyncio.timeout(HOST_CALL_S):
                await self._host_call(action)
        except HostControlError as error:
            raise MoveFailed(str(error)) from None
        except TimeoutError:
            raise MoveFailed(f"no answer within {HOST_CALL_S:g} s") from None

    def _host_call(self, action: Action) -> Awaitable[None]:
        match action:
            case AddHosts(num=num):
                return self._hosts.add(num)
            case DrainHost(node_id=node_id):
                return self._mark(self._hosts.drain, node_id, draining=True)
            case KeepHost(node_id=node_id):
                return self._mark(self._hosts.keep, node_id, draining=False)
            case RemoveHost(node_id=node_id):
                return self._remove(node_id)
        raise AssertionError(action)

    async def _mark(self, call: Callable[[str], Awaitable[None]], node_id: NodeId, *, draining: bool) -> None:
        await call(node_id)
        self.draining = self.draining | {node_id} if draining else self.draining - {node_id}
        self.experts.shunned = self.draining

    async def _remove(self, node_id: NodeId) -> None:
        """Only what is empty: a process there may be the last of its expert."""
        held = [one for one, place in self.experts.places.items() if place == node_id]
        if held:
            raise MoveFailed(f"{node_id} still holds {held[0]}")
        await self._hosts.remove(node_id)

    def serves(self, replica_id: ReplicaId) -> bool:
        """True when the replica is in the map with all its layers and every coordinator can ask it."""
        return self.experts.is_whole(replica_id) and self.experts.acknowledged.can_ask(replica_id)

    def is_gone(self, replica_id: ReplicaId) -> bool:
        """True when the replica has left the map and its process has ended."""
        view = self.experts.views.get(replica_id)
        in_map = any(one.replica_id == replica_id for one in self.experts.state.expert_map.replicas)
        return not in_map and (view is None or view.dead is not None)

    def trouble(self, replica_id: ReplicaId) -> str | None:
        """Why the replica will hardly come, or None."""
        experts = self.experts
        if replica_id not in experts.desired.ids:
            return "it is not wanted any more"
        if replica_id in experts.unplaced:
            return experts.unplaced[replica_id]
        if replica_id in experts.state.refused:
            return experts.state.refused[replica_id]
        record = experts.state.records.get(replica_id)
        if record is not None and record.failures >= HOPELESS_FAILURES:
            return record.detail or "it failed again and again"
        return None

    async def _until(self, holds: Callable[[], bool], limit_s: float, arriving: Collection[ReplicaId]) -> None:
        """Returns when it holds, as looked at after every round. Raises MoveFailed when it hardly will."""
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    await self.experts.looked.wait()
                    if holds():
                        return
                    for replica_id in arriving:
                        why = self.trouble(replica_id)
                        if why is not None:
                            raise MoveFailed(f"{replica_id}: {why}")
        except TimeoutError:
            raise MoveFailed(f"not done within {limit_s:.0f} s") from None
