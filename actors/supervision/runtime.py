"""What the supervisor needs of the world: nodes, and named actors that can be started, found, called and killed.

`actors.ray_runtime` is this interface over Ray, `actors.supervision.in_process` the same inside one event loop.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from actors.ray_runtime import RayNode


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
    """Where actors live; see `actors.ray_runtime` for each."""

    def nodes(self) -> tuple[RayNode, ...]:
        """All living nodes."""

    def find(self, name: str, namespace: str) -> Actor | None:
        """The living actor of that name."""

    def names(self, namespace: str) -> tuple[str, ...]:
        """Names of all living actors."""

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
    ) -> Actor:
        """Starts an actor without waiting for it, or gives the one of that name."""
