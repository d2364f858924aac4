"""The level of hosts as it is told to Ray: on every change, again after failures, and never holding anybody up."""

import asyncio
from collections.abc import Collection

import pytest

from actors.ray_runtime import RuntimeFailure
from actors.supervision import hosts as hosts_module
from actors.supervision.host_control import HostControl, HostControlError
from actors.supervision.hosts import REPEAT_S, RayHosts
from actors.supervision.in_process import InProcessRuntime
from cluster.hosts_wanted import HostLimits
from cluster.ids import NodeId
from cluster.placement import COORDINATOR_HOST, EXPERT_HOST, NodeSlots
from tests.support.front import run

LIMITS = HostLimits(min_hosts=1, max_hosts=3, timeout_s=50.0)


class Failing(InProcessRuntime):
    """Ray's head refuses while `fails`."""

    fails = False

    def request_nodes(self, num: int, resource: str, without: Collection[str] = ()) -> None:
        super().request_nodes(num, resource, without)
        if self.fails:
            raise RuntimeFailure("the head is busy")


class World:
    """Hosts under a clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.runtime = Failing()
        self.said: list[str] = []
        self.hosts = RayHosts(self.runtime, LIMITS, self.said.append, lambda: self.now_s)
        self.there = ["a"]

    async def look(self, after_s: float = 1.0, *, head_silent: bool = False) -> None:
        self.now_s += after_s
        nodes = [slots(name, EXPERT_HOST) for name in self.there]
        await self.hosts.look([*nodes, slots("head", COORDINATOR_HOST)], head_silent=head_silent)


def slots(name: str, role: str) -> NodeSlots:
    return NodeSlots(node_id=NodeId(name), gpu=0, cpu=1, memory_bytes=1, roles=frozenset({role}))


def test_a_level_is_told_once_and_then_now_and_again() -> None:
    async def work() -> None:
        world = World()
        for _ in range(5):
            await world.look()
        assert world.runtime.requests == [(1, frozenset())]
        await world.hosts.add(1)
        assert world.runtime.requests[-1] == (2, frozenset())
        assert await world.hosts.pending() == 1
        world.there = ["a", "b"]
        await world.look()
        assert await world.hosts.pending() == 0
        assert len(world.runtime.requests) == 2
        await world.look(REPEAT_S)
        assert world.runtime.requests[2:] == [(2, frozenset())]

    run(work())


def test_a_host_that_is_given_back_is_named_until_it_is_gone() -> None:
    async def work() -> None:
        world = World()
        world.there = ["a", "b"]
        await world.look()
        await world.hosts.drain("b")
        assert world.hosts.draining == {"b"}
        await world.hosts.remove("b")
        await world.hosts.remove("b")
        assert world.runtime.requests == [(2, frozenset()), (1, frozenset({"b"}))]
        assert (world.hosts.leaving, world.hosts.level) == ({"b"}, 1)
        world.there = ["a"]
        await world.look()
        assert world.runtime.requests[-1] == (1, frozenset())
        with pytest.raises(HostControlError, match="1 are the least"):
            await world.hosts.remove("a")
        with pytest.raises(HostControlError, match="no host b"):
            await world.hosts.drain("b")

    run(work())


def test_a_failure_is_said_and_tried_again_after_growing_pauses() -> None:
    async def work() -> None:
        world = World()
        world.runtime.fails = True
        await world.look()
        assert world.said == ["the head is busy"]
        for _ in range(60):
            await world.look()
        assert 4 <= len(world.runtime.requests) <= 7
        world.runtime.fails = False
        await world.look(hosts_module.MAX_PAUSE_S)
        told = len(world.runtime.requests)
        await world.hosts.add(2)
        assert world.runtime.requests[told:] == [(3, frozenset())]

    run(work())


def test_a_head_that_comes_back_is_told_again_and_one_that_is_away_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        world = World()
        await world.look()
        await world.look(head_silent=True)
        await world.look()
        assert len(world.runtime.requests) == 2
        world.runtime.head.clear()
        monkeypatch.setattr(hosts_module, "PATIENCE_S", 0.01)
        await world.hosts.add(1)
        await world.look()
        assert len(world.runtime.requests) == 2
        world.runtime.head.set()
        for _ in range(3):
            await asyncio.sleep(0)  # the answer comes
            await world.look()
        assert world.runtime.requests[2:] == [(2, frozenset())]

    run(work())


def test_hosts_that_never_come_are_given_up_and_may_be_asked_for_again() -> None:
    async def work() -> None:
        world = World()
        await world.look()
        await world.hosts.add(2)
        await world.look(LIMITS.timeout_s)
        assert any("2 hosts for experts have not come" in line for line in world.said)
        assert (world.hosts.level, world.runtime.requests[-1]) == (1, (1, frozenset()))
        await world.hosts.add(1)
        assert world.runtime.requests[-1] == (2, frozenset())
        await world.hosts.add(1)
        with pytest.raises(HostControlError, match="at most 3"):
            await world.hosts.add(1)

    run(work())


def test_before_the_first_look_nothing_is_promised() -> None:
    async def work() -> None:
        control: HostControl = World().hosts
        assert await control.pending() == 0
        with pytest.raises(HostControlError, match="not known yet"):
            await control.add(1)

    run(work())
