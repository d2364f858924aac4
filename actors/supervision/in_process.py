"""`actors.supervision.runtime.Runtime` without Ray: actors are plain objects in the caller's event loop.

For tests and experiments that need a supervised cluster in one process. An actor here is killed by being forgotten:
calls that run are cancelled and all later ones raise ActorLost, as if its process had died.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from actors.ray_runtime import ActorLost, RayNode

ONE_NODE = RayNode("node-0", "127.0.0.1", num_cpus=2.0, num_gpus=0.0, memory_bytes=1 << 40, labels={})


class InProcessActor:
    """One actor and the calls to it. `target` is the object itself, None once it is dead."""

    def __init__(self, name: str, target: Any, env: Mapping[str, str], node_id: str | None) -> None:
        self.name = name
        self.target = target
        self.env = dict(env)
        self.node_id = node_id
        self._calls: set[asyncio.Task[Any]] = set()
        self._ending: asyncio.Future[Any] | None = None

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Raises ActorLost, TimeoutError, or what the method raised."""
        if self.target is None:
            raise ActorLost(f"{self.name}: it is dead")
        task = asyncio.ensure_future(getattr(self.target, method)(*args))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        try:
            async with asyncio.timeout(timeout_s):
                return await task
        except TimeoutError:
            raise TimeoutError(f"{self.name}.{method} did not answer within {timeout_s:g} s") from None
        except asyncio.CancelledError:
            if self.target is None:
                raise ActorLost(f"{self.name}: it died during {method}") from None
            raise

    def call_sync(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Runs the call to its end in a loop of its own; only for targets that are bound to none."""
        return asyncio.run(self.call(method, *args, timeout_s=timeout_s))

    def kill(self) -> None:
        """Forgets the object. Its sockets would outlive it, so its `stop` is called; `ended` waits for that."""
        target, self.target = self.target, None
        for call in self._calls:
            call.cancel()
        if hasattr(target, "stop"):
            self._ending = asyncio.ensure_future(target.stop())

    async def ended(self) -> None:
        """Returns when a killed object has let go of everything."""
        await asyncio.gather(*filter(None, [self._ending]), return_exceptions=True)


class InProcessRuntime:
    """Nodes as given, actors by (namespace, name). `spawned` has everybody who was ever started, in order."""

    def __init__(self, nodes: tuple[RayNode, ...] = (ONE_NODE,)) -> None:
        self.nodes_now = nodes
        self.spawned: list[InProcessActor] = []
        self._actors: dict[tuple[str, str], InProcessActor] = {}

    def nodes(self) -> tuple[RayNode, ...]:
        """All nodes."""
        return self.nodes_now

    def find(self, name: str, namespace: str) -> InProcessActor | None:
        """The living actor of that name."""
        actor = self._actors.get((namespace, name))
        return actor if actor is not None and actor.target is not None else None

    def names(self, namespace: str) -> tuple[str, ...]:
        """Names of the living."""
        return tuple(sorted(name for space, name in self._actors if space == namespace and self.find(name, space)))

    def spawn(
        self,
        actor_class: type,
        *,
        name: str,
        namespace: str,
        kwargs: Mapping[str, Any],
        env: Mapping[str, str],
        node_id: str | None = None,
        num_gpus: float = 0.0,
        restarts: bool = False,
    ) -> InProcessActor:
        """Builds the object at once; what its constructor raises comes out here."""
        found = self.find(name, namespace)
        if found is not None:
            return found
        actor = InProcessActor(name, actor_class(**kwargs), env, node_id)
        self._actors[namespace, name] = actor
        self.spawned.append(actor)
        return actor
