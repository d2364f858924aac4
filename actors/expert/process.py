"""The expert actor as its process begins: a `gentle` one imports what it needs behind everything else that runs here.

Importing torch takes one or two seconds of a processor, in the middle of other processes' steps when a replica is added
to a cluster that serves. So whoever starts a process names this class, whose module imports nothing; the actor itself
is `actors.expert.actor.ExpertActor`, and has the same methods.
"""

from typing import TYPE_CHECKING, Any

from actors.expert.behind import run_behind
from actors.process_start import importing

if TYPE_CHECKING:
    from actors.expert.actor import ExpertActor


class ExpertProcess:
    """Takes ExpertActor's arguments, and does what it does."""

    def __init__(self, **kwargs: Any) -> None:
        actor_class = run_behind(_imported) if kwargs.get("gentle") else _imported()
        self.actor = actor_class(**kwargs)

    async def start(self) -> str:
        """See ExpertActor."""
        return await self.actor.start()

    async def wait_settled(self) -> dict[str, Any]:
        """See ExpertActor."""
        return await self.actor.wait_settled()

    async def info(self) -> dict[str, Any]:
        """See ExpertActor."""
        return await self.actor.info()

    async def drain(self, timeout_s: float) -> int:
        """See ExpertActor."""
        return await self.actor.drain(timeout_s)

    async def ended(self) -> None:
        """See ExpertActor."""
        await self.actor.ended()

    async def stop(self) -> None:
        """See ExpertActor."""
        await self.actor.stop()


def _imported() -> "type[ExpertActor]":
    with importing():
        from actors.expert.actor import ExpertActor

    return ExpertActor
