"""How balancing asks for nodes and gives them back: the interface, and what stands in where nobody can be asked."""

from typing import Protocol


class HostControlError(Exception):
    """Nodes could not be asked for or given back. One line that says why."""


class HostControl(Protocol):
    """Whoever can change how many nodes there are. Each raises HostControlError, and is asked again later."""

    async def add(self, num: int) -> None:
        """Asks for so many more nodes; they come later, or never."""

    async def drain(self, node_id: str) -> None:
        """This node gets nothing new from now on."""

    async def keep(self, node_id: str) -> None:
        """It does again."""

    async def remove(self, node_id: str) -> None:
        """Gives back a node that holds no experts any more."""

    async def pending(self) -> int:
        """Nodes that were asked for and have not come."""


class NoHostControl:
    """The nodes are as they are."""

    async def add(self, num: int) -> None:
        """Refuses."""
        raise HostControlError(f"no host control: {num} more nodes would help")

    async def drain(self, node_id: str) -> None:
        """Refuses."""
        raise HostControlError(f"no host control: {node_id} stays")

    async def keep(self, node_id: str) -> None:
        """It was never given up."""

    async def remove(self, node_id: str) -> None:
        """Refuses."""
        raise HostControlError(f"no host control: {node_id} stays")

    async def pending(self) -> int:
        """None."""
        return 0
