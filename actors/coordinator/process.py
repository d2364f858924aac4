"""The coordinator actor as its process begins; see `actors.expert.process`, which is the same for experts.

Whoever starts a process must import the class that it names, and the supervisor has no use for torch.
"""

from typing import TYPE_CHECKING, Any

from actors.process_start import importing

if TYPE_CHECKING:
    from actors.coordinator.actor import Coordinator


class CoordinatorProcess:
    """Takes Coordinator's arguments, and does what it does."""

    def __init__(self, **kwargs: Any) -> None:
        self.actor = _imported()(**kwargs)

    async def start(self) -> str:
        """See Coordinator."""
        return await self.actor.start()

    async def info(self) -> dict[str, Any]:
        """See Coordinator."""
        return await self.actor.info()

    async def drain(self, timeout_s: float, end_rest: bool = False) -> int:
        """See Coordinator."""
        return await self.actor.drain(timeout_s, end_rest)

    async def ended(self) -> None:
        """See Coordinator."""
        await self.actor.ended()

    async def stop(self) -> None:
        """See Coordinator."""
        await self.actor.stop()


def _imported() -> "type[Coordinator]":
    with importing():
        from actors.coordinator.actor import Coordinator

    return Coordinator
