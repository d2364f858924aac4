"""What the supervisor needs of the world: nodes, and named actors that can be started, found, called and killed.

`actors.ray_runtime` is this interface over Ray, `actors.supervision.in_process` the same inside one event loop.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, Protocol, TypeVar

from actors.ray_runtime import RayNode

Result = TypeVar("Result")


class Actor(Protocol):
    """A named actor; see `actors.ray_runtime.ActorRef` for what is raised."""

    @property
    def name(self) -> str:
        """Unique in its namespace among the living."""

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Calls `method` from an event loop."""

    def call_sync(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Calls `method` from a thread without an event loop."""

    def kill(self) -> None:
        """Ends the process at once; ending a dead one is no error."""


class Runtime(Protocol):
    """Where actors live; see `actors.ray_runtime` for each.

    `nodes`, `request_nodes`, `find`, `names` and `spawn` wait for the cluster's head, which may be away for minutes: an
    event loop calls them through `aside` and decides itself how long it waits.
    """

    async def aside(self, call: Callable[[], Result]) -> Result:
        """The result of `call`, run beside the event loop."""

    def nodes(self) -> tuple[RayNode, ...]:
        """All living nodes."""

    async def unreachable(self, nodes: Iterable[RayNode]) -> frozenset[str]:
        """Ids of those nodes that do not answer now, whatever the head still believes of them."""

    def request_nodes(self, num: int, resource: str, without: Collection[str] = ()) -> None:
        """There should be so many nodes with this resource, besides those in `without`; it may take, or fail."""

    def find(self, name: str, namespace: str) -> Actor | None:
        """The living actor of that name."""

    def names(self, namespace: str) -> tuple[str, ...]:
        """Names of all living actors."""

    def metric(
        self, kind: Literal["gauge", "counter"], name: str, text: str, labels: tuple[str, ...]
    ) -> Callable[[float, Mapping[str, str]], None]:
        """A metric of this process that others can read; returns what sets a gauge, or adds to a counter."""

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
    ) -> Actor:
        """Starts an actor without waiting for it, or gives the one of that name."""
