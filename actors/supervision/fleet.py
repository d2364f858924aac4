"""The cluster's processes as the supervisor handles them: starts one, looks at all, ends one, finds them again.

A process is known by an id that survives restarts and an incarnation that does not; both are in its Ray name, so a
new supervisor finds what an old one started. Which processes there should be is decided in `cluster/`.
"""

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from actors import ray_runtime
from actors.supervision.member import INFO_TIMEOUT_S, Member, View
from actors.supervision.runtime import Actor, Runtime
from cluster.liveness import LivenessPolicy

LOG = logging.getLogger(__name__)

OBSERVE_S = 0.5
"""A look waits so long for answers. Who is slower is still being asked when the next one comes, and holds nobody up."""


@dataclass(slots=True)
class Fleet:
    """Processes of one kind and namespace; used from the supervisor's event loop only.

    `changed` is set when there is reason to look before the next round: a start has ended, or a process has.
    """

    namespace: str
    prefix: str
    runtime: Runtime = ray_runtime
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    liveness: LivenessPolicy = field(default_factory=LivenessPolicy)
    members: dict[str, Member] = field(default_factory=dict)
    stopping: set[asyncio.Task[None]] = field(default_factory=set)

    async def adopt(self) -> None:
        """Takes over living actors that an earlier supervisor started; of two with one id, the newer one stays."""
        for name in await self.runtime.aside(partial(self.runtime.names, self.namespace)):
            kind, _, rest = name.partition("/")
            process_id, _, incarnation = rest.rpartition("/")
            if kind == self.prefix and process_id and incarnation.isdigit():
                await self._adopt(name, process_id, int(incarnation))

    async def _adopt(self, name: str, process_id: str, incarnation: int) -> None:
        known = self.members.get(process_id)
        if known is not None and known.incarnation == incarnation:
            return
        actor = await self.runtime.aside(partial(self.runtime.find, name, self.namespace))
        if actor is None:
            return
        if known is None or known.incarnation < incarnation:
            self.members[process_id] = self._member(process_id, incarnation, actor=actor)
            actor = None if known is None else known.actor
        if actor is not None:
            actor.kill()

    def start(
        self,
        process_id: str,
        incarnation: int,
        actor_class: type,
        kwargs: Mapping[str, Any],
        *,
        env: Mapping[str, str],
        node_id: str | None,
        num_gpus: float,
        role: str | None = None,
    ) -> None:
        """Begins to start a process; how that goes shows in `observe`.

        Whatever is left of an earlier incarnation ends first. `role` is what its node is for, if that was said.
        """
        earlier = self.members.get(process_id)
        if earlier is not None:
            earlier.end("another takes its place")
        spawn = partial(
            self.runtime.spawn,
            actor_class,
            name=f"{self.prefix}/{process_id}/{incarnation}",
            namespace=self.namespace,
            kwargs=kwargs,
            env=env,
            node_id=node_id,
            num_gpus=num_gpus,
            role=role,
        )
        member = self._member(process_id, incarnation, node_id=node_id)
        member.begin(spawn)
        self.members[process_id] = member

    def _member(
        self, process_id: str, incarnation: int, *, actor: Actor | None = None, node_id: str | None = None
    ) -> Member:
        return Member(
            process_id,
            incarnation,
            self.runtime,
            self.changed,
            actor=actor,
            node_id=node_id,
            liveness=self.liveness,
        )

    async def observe(self, *, away: Collection[str] = (), lost_nodes: Collection[str] = ()) -> dict[str, View]:
        """Asks every process how it is, all at once; one that is given up is killed and dead.

        `away` are processes that others have lost, `lost_nodes` nodes that do not answer; see `cluster.liveness`.
        """
        looks = []
        for member in self.members.values():
            member.away = member.process_id in away
            member.node_away = member.node_id in lost_nodes
            looks.append(member.look())
        if looks:
            await asyncio.wait(looks, timeout=OBSERVE_S)
        return {name: member.view for name, member in self.members.items()}

    def forget(self, process_id: str) -> None:
        """Of a process that is dead and will not be started again, nothing needs to be kept."""
        member = self.members.get(process_id)
        if member is not None and member.view.dead is not None:
            del self.members[process_id]

    def stop_later(self, process_id: str, incarnation: int, *, drain_s: float) -> None:
        """`stop`, without waiting for it."""
        task = asyncio.get_running_loop().create_task(self.stop(process_id, incarnation, drain_s=drain_s))
        self.stopping.add(task)
        task.add_done_callback(self.stopping.discard)

    async def drain_all(self, *, drain_s: float) -> None:
        """Tells everybody to take nothing new, and waits up to `drain_s` seconds for what they have.

        What is not done by then is ended with a word to whoever waits for it: this is the end of the whole cluster.
        """
        members = [member for member in self.members.values() if member.has_spoken]
        drains = [one.tell("drain", drain_s, True, timeout_s=drain_s + INFO_TIMEOUT_S) for one in members]
        _log_failures("drain", members, await asyncio.gather(*drains, return_exceptions=True))

    async def stop_all(self) -> None:
        """`stop`, for everybody at once."""
        members = list(self.members.values())
        stops = (self.stop(one.process_id, one.incarnation, drain_s=0.0) for one in members)
        _log_failures("stop", members, await asyncio.gather(*stops, return_exceptions=True))

    async def stop(self, process_id: str, incarnation: int, *, drain_s: float) -> None:
        """Ends a process; with `drain_s` > 0 it answers what it has first. One that is gone is no error."""
        member = self.members.get(process_id)
        if member is None or member.incarnation != incarnation:
            return
        try:
            await member.stop(drain_s)
        finally:
            if self.members.get(process_id) is member:
                del self.members[process_id]


def _log_failures(what: str, members: Iterable[Member], results: Iterable[BaseException | None]) -> None:
    for member, result in zip(members, results, strict=True):
        if isinstance(result, BaseException):
            LOG.info("%s did not %s: %s", member.process_id, what, result)
