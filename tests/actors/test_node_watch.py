"""Nodes as far as can be known: a head that is silent holds nobody up, and a node that answers nobody is lost."""

import asyncio
import socket
from collections.abc import Iterable
from dataclasses import replace

import pytest

import actors.supervision.node_watch as node_watch_module
from actors import ray_runtime
from actors.ray_runtime import RayNode, RuntimeFailure
from actors.supervision.in_process import ONE_NODE, InProcessRuntime
from actors.supervision.node_watch import NodeWatch
from tests.support.front import run

TWO_NODES = (ONE_NODE, replace(ONE_NODE, node_id="node-1"))


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_watch_module, "PATIENCE_S", 0.01)
    monkeypatch.setattr(node_watch_module, "PROBE_WAIT_S", 0.01)


def test_a_silent_head_leaves_what_was_known_and_one_question_open() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        asked = 0

        def nodes() -> tuple[RayNode, ...]:
            nonlocal asked
            asked += 1
            return TWO_NODES

        runtime.nodes = nodes  # type: ignore[method-assign]
        watch = NodeWatch(runtime)
        await watch.look()
        assert [one.node_id for one in watch.slots] == ["node-0", "node-1"]
        runtime.head.clear()
        for _ in range(5):
            await watch.look()
            assert watch.head_silent
            assert len(watch.slots) == 2
        runtime.head.set()
        await asyncio.sleep(0)
        await watch.look()
        assert not watch.head_silent
        assert asked == 2, "the answer to the question that was open"

    run(work())


@pytest.mark.parametrize("answer", [(), None])
def test_a_head_that_knows_no_node_or_gives_up_is_silent(answer: tuple[RayNode, ...] | None) -> None:
    def nodes() -> tuple[RayNode, ...]:
        if answer is None:
            raise RuntimeFailure("timed out")
        return answer

    async def work() -> None:
        runtime = InProcessRuntime()
        runtime.nodes = nodes  # type: ignore[method-assign]
        watch = NodeWatch(runtime)
        await watch.look()
        assert watch.head_silent
        assert watch.slots == ()

    run(work())


def test_who_does_not_answer_is_lost_until_it_does() -> None:
    async def work() -> None:
        runtime = InProcessRuntime(TWO_NODES)
        watch = NodeWatch(runtime)
        runtime.lost = frozenset({"node-1"})
        await watch.look()
        assert watch.lost == {"node-1"}
        runtime.lost = frozenset()
        await watch.look()
        assert watch.lost == frozenset()
        alone = InProcessRuntime()
        alone.lost = frozenset({"node-0"})
        watch = NodeWatch(alone)
        await watch.look()
        assert watch.lost == frozenset(), "who asks is on it"

    run(work())


def test_a_probe_that_takes_long_is_not_waited_for() -> None:
    class Slow(InProcessRuntime):
        """Tells which nodes are lost when it is told to."""

        def __init__(self) -> None:
            super().__init__(TWO_NODES)
            self.answer = asyncio.Event()

        async def unreachable(self, nodes: Iterable[RayNode]) -> frozenset[str]:
            await self.answer.wait()
            return frozenset({"node-1"})

    async def work() -> None:
        runtime = Slow()
        watch = NodeWatch(runtime)
        await watch.look()
        assert watch.lost == frozenset()
        runtime.answer.set()
        await watch.look()
        assert watch.lost == {"node-1"}

    run(work())


def test_a_node_is_asked_by_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runtime, "PROBE_TIMEOUT_S", 100.0)  # who is there is heard, however slow the machine is

    async def work() -> None:
        with socket.socket() as listening, socket.socket() as bound:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            bound.bind(("127.0.0.1", 0))  # and does not listen
            ports = {"there": listening.getsockname()[1], "gone": bound.getsockname()[1], "unknown": 0}
            nodes = [replace(ONE_NODE, node_id=name, port=port) for name, port in ports.items()]
            assert await ray_runtime.unreachable(nodes) == {"gone"}

    run(work())


def test_a_call_aside_leaves_the_loop_free() -> None:
    async def work() -> None:
        loop, told = asyncio.get_running_loop(), asyncio.Event()

        def call() -> str:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(100)  # the loop runs meanwhile
            loop.call_soon_threadsafe(told.set)
            return "done"

        assert await ray_runtime.aside(call) == "done"
        await told.wait()

    run(work())
