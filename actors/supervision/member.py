"""One process as the supervisor handles it: started, asked how it is, ended. No wait here is without a bound.

Ray is asked aside, since its head may be away; the process is asked directly, which works without the head. Which
processes there are is `actors.supervision.fleet`'s, when silence is death `cluster.liveness`'s.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from actors.ray_runtime import ActorLost, ActorUnreachable, RuntimeFailure
from actors.supervision.runtime import Actor, Runtime
from cluster.liveness import LivenessPolicy, is_lost

LOG = logging.getLogger(__name__)

INFO_TIMEOUT_S = 5.0
SPAWN_TIMEOUT_S = 20.0
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


class Member:
    """A process of a fleet; used from one event loop. `changed` is set when there is reason to look at it.

    `actor` is there at once for one that was found, and after `begin` for one that is new. `away` and `node_away` are
    what others say of it; see `cluster.liveness`.
    """

    def __init__(
        self,
        process_id: str,
        incarnation: int,
        runtime: Runtime,
        changed: asyncio.Event,
        *,
        actor: Actor | None = None,
        node_id: str | None = None,
        liveness: LivenessPolicy | None = None,
    ) -> None:
        self.process_id = process_id
        self.incarnation = incarnation
        self.actor = actor
        self.node_id = node_id
        self.away = self.node_away = False
        self.view = View(process_id, incarnation, None, None, node_id)
        self._runtime = runtime
        self._changed = changed
        self._liveness = liveness
        self._unanswered_since_s: float | None = None
        self._ended: str | None = None
        """Why it was killed, if it was: what Ray says of a killed process helps nobody."""
        self._beginning: asyncio.Task[None] | None = None
        self._look: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def has_spoken(self) -> bool:
        """True once its process is up and was heard; before, a polite word would only wait for it."""
        return self.view.info is not None and self.actor is not None

    def begin(self, spawn: Callable[[], Actor] | None = None) -> None:
        """Has the process made, if there is none, and its `start` called; how that went shows in `view`."""
        self._beginning = asyncio.create_task(self._begin(spawn))

    def look(self) -> asyncio.Task[None]:
        """The question that is being asked, or a new one; `view` has the answer when it is done."""
        self._give_up_if_lost()
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(self._ask())
        return self._look

    def end(self, why: str) -> None:
        """Kills the process, which frees its memory before anybody takes its place."""
        self._ended = why
        if self.actor is not None:
            self.actor.kill()
        self._see(None, why)

    async def stop(self, drain_s: float) -> None:
        """Ends the process; with `drain_s` > 0 it answers what it has first. One that is gone is no error."""
        try:
            if self.has_spoken and drain_s > 0:
                await self.tell("drain", drain_s, timeout_s=drain_s + INFO_TIMEOUT_S)
            if self.has_spoken:
                await self.tell("stop", timeout_s=INFO_TIMEOUT_S)
        except (ActorLost, TimeoutError) as error:
            LOG.info("%s did not stop by itself: %s", self.process_id, error)
        finally:
            self.end("stopped")
        if self.actor is None and self._beginning is not None:  # whoever is just being made ends when it is there
            await asyncio.wait({self._beginning}, timeout=INFO_TIMEOUT_S)

    async def tell(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Calls a method of a process that has spoken; raises as `actors.ray_runtime.ActorRef.call` does."""
        assert self.actor is not None, f"{self.process_id} has no process yet"
        return await self.actor.call(method, *args, timeout_s=timeout_s)

    async def _begin(self, spawn: Callable[[], Actor] | None) -> None:
        try:
            if spawn is not None:
                self.actor = await self._spawned(spawn)
            assert self.actor is not None, f"{self.process_id} has no process to start"
            if self._ended is not None:  # meanwhile, and nobody could be killed then
                self.actor.kill()
                return
            await self.actor.call("start", timeout_s=START_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - whatever start raised is why this process is dead
            if self._ended is None:
                self.end(f"{type(error).__name__}: {error}")
        self._changed.set()

    async def _spawned(self, spawn: Callable[[], Actor]) -> Actor:
        """The actor; one that appears only when nobody waits for it any more is killed."""
        making = asyncio.ensure_future(self._runtime.aside(spawn))
        made, _ = await asyncio.wait({making}, timeout=SPAWN_TIMEOUT_S)
        if not made:
            making.add_done_callback(_kill_late)
            raise RuntimeFailure(f"Ray did not begin to start it within {SPAWN_TIMEOUT_S:g} s")
        return making.result()

    async def _ask(self) -> None:
        if self._ended is None and self.actor is not None:
            asked_s = time.monotonic()
            try:
                info = await self.actor.call("info", timeout_s=INFO_TIMEOUT_S)
                if self._ended is None:
                    self._heard(info)
            except (ActorUnreachable, TimeoutError):
                self._missed(asked_s)
            except ActorLost as error:
                self._see(None, self._ended or str(error))

    def _heard(self, info: Mapping[str, Any]) -> None:
        assert self.actor is not None
        self._unanswered_since_s = None
        self.node_id = str(info["node_id"]) or self.node_id
        self._see(info)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._wait_for_its_end(self.actor))
        if info["state"] == "failed":
            self.end(str(info.get("detail", "")) or "it failed without saying why")
        elif not info["address"] and self._beginning is None:
            self.begin()  # adopted from a supervisor that died between making the process and starting it

    async def _wait_for_its_end(self, actor: Actor) -> None:
        """A call that is answered when the process stops, and fails the moment that it dies: then it is looked at."""
        with contextlib.suppress(RuntimeFailure, TimeoutError):
            await actor.call("ended", timeout_s=math.inf)
        self._changed.set()

    def _missed(self, asked_s: float) -> None:
        """A busy process may be silent for a while, and keeps its last view; one that is starting has not begun."""
        if self._unanswered_since_s is None and (self._beginning is None or self._beginning.done()):
            self._unanswered_since_s = asked_s
        self._give_up_if_lost()

    def _give_up_if_lost(self) -> None:
        since_s = self._unanswered_since_s
        silent_s = 0.0 if since_s is None else time.monotonic() - since_s
        lost = is_lost(
            silent_s, spoken=self.has_spoken, away=self.away, node_away=self.node_away, policy=self._liveness
        )
        if lost and self._ended is None:
            self.end("its node does not answer" if self.node_away else f"did not answer for {silent_s:.0f} s")

    def _see(self, info: Mapping[str, Any] | None, dead: str | None = None) -> None:
        self.view = View(self.process_id, self.incarnation, info, dead, self.node_id)


def _kill_late(making: asyncio.Future[Actor]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().kill()
