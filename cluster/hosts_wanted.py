"""How many hosts for experts are asked for in all: a level between two limits, and hosts on their way out.

A level, not a list of orders: it is told again and again, and whoever provides hosts makes it true, also when a host
is lost. Whether there should be more or fewer is a policy's decision (`autoscale`); telling is the supervisor's.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from cluster.ids import NodeId


class HostsRefused(Exception):
    """The level cannot be changed like that. One line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLimits:
    """The level is always within these. Hosts that have not come after `timeout_s` are not waited for any more."""

    min_hosts: int
    max_hosts: int
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_hosts <= self.max_hosts or not self.timeout_s > 0:
            raise ValueError(
                f"min_hosts is {self.min_hosts}, max_hosts {self.max_hosts}, timeout_s {self.timeout_s}: "
                "the first at least 1 and at most the second, the last above 0"
            )

    def within(self, num: int) -> int:
        """The nearest level that is allowed."""
        return max(self.min_hosts, min(self.max_hosts, num))


@dataclass(frozen=True, slots=True, kw_only=True)
class HostsWanted:
    """The level; hosts that were given back and are still there; since when hosts are lacking, if they are.

    `draining` hosts count as hosts: they are not given back yet.
    """

    level: int
    leaving: frozenset[NodeId] = frozenset()
    draining: frozenset[NodeId] = frozenset()
    lacking_since_s: float | None = None

    def usable(self, present: Collection[NodeId]) -> int:
        """Hosts of those that are there, without those on their way out."""
        return len(set(present) - self.leaving)

    def pending(self, present: Collection[NodeId]) -> int:
        """Hosts that are asked for and have not come."""
        return max(self.level - self.usable(present), 0)

    def add(self, num: int, present: Collection[NodeId], now_s: float, limits: HostLimits) -> "HostsWanted":
        """So many more. Hosts on their way out that are still there come first: nothing is cheaper.

        Raises HostsRefused when there may be no more at all.
        """
        before = max(self.level, self.usable(present))
        level = min(before + num, limits.max_hosts)
        if level <= before:
            raise HostsRefused(f"{num} more hosts are wanted, but {before} are asked for and at most {level} allowed")
        back = sorted(self.leaving & set(present))[: level - before]
        return replace(self, level=level, leaving=self.leaving - set(back), lacking_since_s=now_s)

    def drain(self, node_id: NodeId) -> "HostsWanted":
        """This host gets nothing new."""
        return replace(self, draining=self.draining | {node_id})

    def keep(self, node_id: NodeId, limits: HostLimits) -> "HostsWanted":
        """It does again, also one that was given back and is still there."""
        if node_id in self.leaving:
            return replace(self, level=limits.within(self.level + 1), leaving=self.leaving - {node_id})
        return replace(self, draining=self.draining - {node_id})

    def remove(self, node_id: NodeId, present: Collection[NodeId], limits: HostLimits) -> "HostsWanted":
        """Gives a host back. Doing it twice is doing it once. Raises HostsRefused below the minimum."""
        if node_id in self.leaving or node_id not in present:
            return replace(self, draining=self.draining - {node_id})
        left = self.usable(present) - 1
        if left < limits.min_hosts:
            raise HostsRefused(f"{node_id} stays: there would be {left} hosts, and {limits.min_hosts} are the least")
        return replace(
            self,
            level=limits.within(left + self.pending(present)),
            leaving=self.leaving | {node_id},
            draining=self.draining - {node_id},
        )

    def settled(self, present: Collection[NodeId], now_s: float, limits: HostLimits) -> tuple["HostsWanted", int]:
        """After a look at the hosts that are there; and how many are not waited for any more.

        Hosts that came by themselves are in the level, so that one that is lost is replaced.
        """
        there = set(present)
        after = replace(self, leaving=self.leaving & there, draining=self.draining & there)
        usable = after.usable(there)
        after = replace(after, level=limits.within(max(after.level, usable)))
        if usable >= after.level:
            return replace(after, lacking_since_s=None), 0
        since_s = now_s if after.lacking_since_s is None else after.lacking_since_s
        if now_s - since_s < limits.timeout_s:
            return replace(after, lacking_since_s=since_s), 0
        level = limits.within(usable)
        return replace(after, level=level, lacking_since_s=now_s), after.level - level


def begin(present: Collection[NodeId], limits: HostLimits) -> HostsWanted:
    """What is there, within the limits. What an earlier supervisor asked for and did not get is asked for again."""
    return HostsWanted(level=limits.within(len(set(present))))
