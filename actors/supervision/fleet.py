"""The cluster's processes as the supervisor handles them: starts one, looks at all, ends one, finds them again.

A process is known by an id that survives restarts and an incarnation that does not; both are in its Ray name, so a
new supervisor finds what an old one started. Which processes there should be is decided in `cluster/`.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from actors import ray_runtime
from actors.ray_runtime import ActorLost, ActorRef

LOG = logging.getLogger(__name__)

INFO_TIMEOUT_S = 5.0
MISSES_TO_DEATH = 6
START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class View:
    """What was last seen of one process. `info` is its own account, None when it has not answered yet.

    `dead` says why there is no process any more.
    """

    process_id: str
    incarnation: int
    info: Mapping[str, Any] | None
    dead: str | None = None

    @property
    def state(self) -> str:
        """loading, ready, draining, failed; or starting and dead, which a process cannot say itself."""
        if self.dead is not None:
            return "dead"
        return "starting" if self.info is None else str(self.info["state"])

    @property
    def detail(self) -> str:
        """Why it is dead, or what it says of itself."""
        return self.dead or ("" if self.info is None else str(self.info.get("detail", "")))


@dataclass(slots=True)
class _Member:
    process_id: str
    incarnation: int
    actor: ActorRef
    misses: int = 0
    view: View | None = None
    starting: asyncio.Task[None] | None = None
    start_error: str | None = None


@dataclass(slots=True)
class Fleet:
    """Processes of one kind and namespace; used from the supervisor's event loop only."""

    namespace: str
    prefix: str
    members: dict[str, _Member] = field(default_factory=dict)
    stopping: set[asyncio.Task[None]] = field(default_factory=set)

    def adopt(self, process_ids: Iterable[str]) -> None:
        """Takes over living actors that an earlier supervisor started for these ids."""
        wanted = set(process_ids)
        for name in ray_runtime.names(self.namespace):
            kind, _, rest = name.partition("/")
            process_id, _, incarnation = rest.rpartition("/")
            if kind != self.prefix or process_id not in wanted or not incarnation.isdigit():
                continue
            actor = ray_runtime.find(name, self.namespace)
            known = self.members.get(process_id)
            if actor is None or (known is not None and known.incarnation > int(incarnation)):
                continue
            self.members[process_id] = _Member(process_id, int(incarnation), actor)

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
    ) -> None:
        """Starts a process and its `start()`; how that went shows in `observe`. Raises RuntimeFailure."""
        actor = ray_runtime.spawn(
            actor_class,
            name=f"{self.prefix}/{process_id}/{incarnation}",
            namespace=self.namespace,
            kwargs=kwargs,
            env=env,
            node_id=node_id,
            num_gpus=num_gpus,
        )
        member = _Member(process_id, incarnation, actor)
        member.starting = asyncio.create_task(_start(member))
        self.members[process_id] = member

    async def observe(self) -> dict[str, View]:
        """Asks every process how it is, all at once; one that stays silent too often is killed and dead."""
        await asyncio.gather(*(_look(member) for member in self.members.values()))
        return {name: member.view for name, member in self.members.items() if member.view is not None}

    def stop_later(self, process_id: str, incarnation: int, *, drain_s: float) -> None:
        """`stop`, without waiting for it."""
        task = asyncio.get_running_loop().create_task(self.stop(process_id, incarnation, drain_s=drain_s))
        self.stopping.add(task)
        task.add_done_callback(self.stopping.discard)

    async def drain_all(self, *, drain_s: float) -> None:
        """Tells everybody to take nothing new, and waits up to `drain_s` seconds for what they have."""
        members = list(self.members.values())
        drains = [one.actor.call("drain", drain_s, timeout_s=drain_s + INFO_TIMEOUT_S) for one in members]
        for member, result in zip(members, await asyncio.gather(*drains, return_exceptions=True), strict=True):
            if isinstance(result, BaseException):
                LOG.info("%s did not drain: %s", member.process_id, result)

    async def stop_all(self) -> None:
        """`stop`, for everybody at once."""
        members = list(self.members.values())
        await asyncio.gather(*(self.stop(one.process_id, one.incarnation, drain_s=0.0) for one in members))

    async def stop(self, process_id: str, incarnation: int, *, drain_s: float) -> None:
        """Ends a process; with `drain_s` > 0 it answers what it has first. One that is gone is no error."""
        member = self.members.get(process_id)
        if member is None or member.incarnation != incarnation:
            return
        try:
            if drain_s > 0:
                await member.actor.call("drain", drain_s, timeout_s=drain_s + INFO_TIMEOUT_S)
            await member.actor.call("stop", timeout_s=INFO_TIMEOUT_S)
        except (ActorLost, TimeoutError) as error:
            LOG.info("%s did not stop by itself: %s", process_id, error)
        member.actor.kill()
        if self.members.get(process_id) is member:
            del self.members[process_id]


async def _start(member: _Member) -> None:
    try:
        await member.actor.call("start", timeout_s=START_TIMEOUT_S)
    except Exception as error:  # noqa: BLE001 - whatever start raised is why this process is dead
        member.start_error = f"{type(error).__name__}: {error}"
        member.actor.kill()


async def _look(member: _Member) -> None:
    def seen(info: Mapping[str, Any] | None, dead: str | None = None) -> None:
        member.view = View(member.process_id, member.incarnation, info, dead)

    if member.start_error is not None:
        seen(None, member.start_error)
        return
    try:
        info = await member.actor.call("info", timeout_s=INFO_TIMEOUT_S)
        member.misses = 0
        seen(info)
    except ActorLost as error:
        seen(None, str(error))
    except TimeoutError:
        still_starting = member.starting is not None and not member.starting.done()
        member.misses += 0 if still_starting else 1
        if member.misses >= MISSES_TO_DEATH:
            member.actor.kill()
            seen(None, f"did not answer for {MISSES_TO_DEATH * INFO_TIMEOUT_S:g} s")
        elif member.view is None:
            seen(None)
