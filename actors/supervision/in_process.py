"""`actors.supervision.runtime.Runtime` without Ray: actors are plain objects in the caller's event loop.

For tests and experiments that need a supervised cluster in one process. An actor here is killed by being forgotten:
calls that run are cancelled and all later ones raise ActorLost, as if its process had died.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

from actors.ray_runtime import ActorLost, RayNode
from actors.supervision.runtime import Result

ONE_NODE = RayNode("node-0", "127.0.0.1", num_cpus=2.0, num_gpus=0.0, memory_bytes=1 << 40, labels={})


class InProcessActor:
    """One actor and the calls to it. `target` is the object itself, None once it is dead."""

    def __init__(
        self, name: str, target: Any, env: Mapping[str, str], node_id: str | None, role: str | None = None
    ) -> None:
        self.name = name
        self.target = target
        self.env = dict(env)
        self.node_id = node_id
        self.role = role
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
            self._ending = asyncio.gather(target.stop(), return_exceptions=True)  # a dead process complains to nobody

    async def ended(self) -> None:
        """Returns when a killed object has let go of everything."""
        if self._ending is not None:
            await self._ending


class InProcessRuntime:
    """Nodes as given, actors by (namespace, name). `spawned` has everybody who was ever started, `requests` every
    level of nodes that was asked for (and ids that do not count), in order; nobody makes them.

    Nodes whose ids are in `lost` answer nobody; while `head` is cleared, everything that needs it waits.
    """

    def __init__(self, nodes: tuple[RayNode, ...] = (ONE_NODE,)) -> None:
        self.nodes_now = nodes
        self.lost: frozenset[str] = frozenset()
        self.head = asyncio.Event()
        self.head.set()
        self.requests: list[tuple[int, frozenset[str]]] = []
        self.spawned: list[InProcessActor] = []
        self.metrics: dict[tuple[str, tuple[str, ...]], float] = {}
        self._actors: dict[tuple[str, str], InProcessActor] = {}

    async def aside(self, call: Callable[[], Result]) -> Result:
        """Its objects belong to the event loop: the call is made in it, once there is a head."""
        await self.head.wait()
        return call()

    def nodes(self) -> tuple[RayNode, ...]:
        """All nodes."""
        return self.nodes_now

    async def unreachable(self, nodes: Iterable[RayNode]) -> frozenset[str]:
        """Those of `lost`."""
        return self.lost & {node.node_id for node in nodes}

    def request_nodes(self, num: int, resource: str, without: Collection[str] = ()) -> None:
        """Writes it down."""
        self.requests.append((num, frozenset(without)))

    def find(self, name: str, namespace: str) -> InProcessActor | None:
        """The living actor of that name."""
        actor = self._actors.get((namespace, name))
        return actor if actor is not None and actor.target is not None else None

    def names(self, namespace: str) -> tuple[str, ...]:
        """Names of the living."""
        return tuple(sorted(name for space, name in self._actors if space == namespace and self.find(name, space)))

    def metric(
        self, kind: Literal["gauge", "counter"], name: str, text: str, labels: tuple[str, ...]
    ) -> Callable[[float, Mapping[str, str]], None]:
        """Values are kept in `metrics`, by name and labels."""

        def record(value: float, tags: Mapping[str, str]) -> None:
            assert set(tags) == set(labels), f"{name} has the labels {labels}, not {tags}"
            key = name, tuple(tags[label] for label in labels)
            self.metrics[key] = value if kind == "gauge" else self.metrics.get(key, 0.0) + value

        return record

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
        on_head: bool = False,
        role: str | None = None,
    ) -> InProcessActor:
        """Builds the object at once; what its constructor raises comes out here."""
        found = self.find(name, namespace)
        if found is not None:
            return found
        actor = InProcessActor(name, actor_class(**kwargs), env, node_id, role)
        self._actors[namespace, name] = actor
        self.spawned.append(actor)
        return actor
