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
from actors.ray_runtime import ActorLost
from actors.supervision.runtime import Actor, Runtime

LOG = logging.getLogger(__name__)

INFO_TIMEOUT_S = 5.0
MISSES_TO_DEATH = 6
START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class View:
    """What was last seen of one process. `info` is its own account, None when it has not answered yet.

    `dead` says why there is no process any more. `node_id` is where it is, or was told to go; None when unknown.
    """

    process_id: str
    incarnation: int
    info: Mapping[str, Any] | None
    dead: str | None = None
    node_id: str | None = None

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
    actor: Actor
    node_id: str | None = None
    misses: int = 0
    view: View | None = None
    starting: asyncio.Task[None] | None = None
    ended: str | None = None
    """Why it was killed, if it was: what Ray says of a killed process helps nobody."""

    @property
    def has_spoken(self) -> bool:
        """True once its process is up and was heard; before, a polite word would only wait for it."""
        return self.view is not None and self.view.info is not None

    def end(self, why: str) -> None:
        """Kills the process, which frees its memory before anybody takes its place."""
        self.ended = why
        self.actor.kill()


@dataclass(slots=True)
class Fleet:
    """Processes of one kind and namespace; used from the supervisor's event loop only."""

    namespace: str
    prefix: str
    runtime: Runtime = ray_runtime
    members: dict[str, _Member] = field(default_factory=dict)
    stopping: set[asyncio.Task[None]] = field(default_factory=set)

    def adopt(self, process_ids: Iterable[str]) -> None:
        """Takes over living actors that an earlier supervisor started for these ids; of two, the newer one stays."""
        wanted = set(process_ids)
        for name in self.runtime.names(self.namespace):
            kind, _, rest = name.partition("/")
            process_id, _, incarnation = rest.rpartition("/")
            if kind != self.prefix or process_id not in wanted or not incarnation.isdigit():
                continue
            actor = self.runtime.find(name, self.namespace)
            known = self.members.get(process_id)
            if actor is None:
                continue
            if known is None or known.incarnation < int(incarnation):
                self.members[process_id] = _Member(process_id, int(incarnation), actor)
                actor = None if known is None else known.actor
            elif known.incarnation == int(incarnation):
                continue
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
    ) -> None:
        """Starts a process and its `start()`; how that went shows in `observe`. Raises RuntimeFailure.

        Whatever is left of an earlier incarnation ends first.
        """
        earlier = self.members.get(process_id)
        if earlier is not None:
            earlier.actor.kill()
        actor = self.runtime.spawn(
            actor_class,
            name=f"{self.prefix}/{process_id}/{incarnation}",
            namespace=self.namespace,
            kwargs=kwargs,
            env=env,
            node_id=node_id,
            num_gpus=num_gpus,
        )
        member = _Member(process_id, incarnation, actor, node_id)
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
        members = [member for member in self.members.values() if member.has_spoken]
        drains = [one.actor.call("drain", drain_s, timeout_s=drain_s + INFO_TIMEOUT_S) for one in members]
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
            if member.has_spoken and drain_s > 0:
                await member.actor.call("drain", drain_s, timeout_s=drain_s + INFO_TIMEOUT_S)
            if member.has_spoken:
                await member.actor.call("stop", timeout_s=INFO_TIMEOUT_S)
        except (ActorLost, TimeoutError) as error:
            LOG.info("%s did not stop by itself: %s", process_id, error)
        finally:
            member.end("stopped")
            if self.members.get(process_id) is member:
                del self.members[process_id]


async def _start(member: _Member) -> None:
    try:
        await member.actor.call("start", timeout_s=START_TIMEOUT_S)
    except Exception as error:  # noqa: BLE001 - whatever start raised is why this process is dead
        if member.ended is None:
            member.end(f"{type(error).__name__}: {error}")


async def _look(member: _Member) -> None:
    if member.ended is None:
        try:
            info = await member.actor.call("info", timeout_s=INFO_TIMEOUT_S)
            _heard(member, info)
        except ActorLost as error:
            _see(member, None, str(error))
        except TimeoutError:
            _missed(member)
    if member.ended is not None:
        _see(member, None, member.ended)


def _heard(member: _Member, info: Mapping[str, Any]) -> None:
    member.misses = 0
    member.node_id = str(info["node_id"]) or member.node_id
    _see(member, info)
    if info["state"] == "failed":
        member.end(str(info.get("detail", "")) or "it failed without saying why")
    elif not info["address"] and member.starting is None:
        # Adopted from a supervisor that died between making the process and starting it.
        member.starting = asyncio.create_task(_start(member))


def _missed(member: _Member) -> None:
    """A busy process may be silent for a while, and keeps its last view; one that is starting has not begun."""
    if member.starting is None or member.starting.done():
        member.misses += 1
    if member.misses >= MISSES_TO_DEATH:
        member.end(f"did not answer for {MISSES_TO_DEATH * INFO_TIMEOUT_S:g} s")
    elif member.view is None:
        _see(member, None)


def _see(member: _Member, info: Mapping[str, Any] | None, dead: str | None = None) -> None:
    member.view = View(member.process_id, member.incarnation, info, dead, member.node_id)


def _log_failures(what: str, members: Iterable[_Member], results: Iterable[BaseException | None]) -> None:
    for member, result in zip(members, results, strict=True):
        if isinstance(result, BaseException):
            LOG.info("%s did not %s: %s", member.process_id, what, result)
