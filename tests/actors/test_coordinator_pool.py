"""Which coordinator gets a request, and how they are looked at. Taking over is in test_ingress_app."""

from contextlib import aclosing

import pytest

from actors.front.coordinator_client import CoordinatorLost
from actors.front.coordinator_pool import CoordinatorPool
from protos.coordinator_pb2 import SequenceOutput, Submit
from protos.expert_pb2 import STATUS_OVERLOADED
from tests.support.front import run
from tests.support.scripted_coordinator import ScriptedCoordinator, failing, saying


async def outputs(pool: CoordinatorPool, submit: Submit) -> list[SequenceOutput]:
    async with aclosing(pool.generate(submit)) as stream:
        return [output async for output in stream]


def two() -> tuple[ScriptedCoordinator, ScriptedCoordinator]:
    return ScriptedCoordinator(saying([7]), address="a:1"), ScriptedCoordinator(saying([8]), address="b:1")


def test_the_least_loaded_is_chosen() -> None:
    first, second = two()
    first.inflight_tokens = 10

    async def work() -> None:
        (output,) = await outputs(CoordinatorPool([first, second]), Submit(max_tokens=1))
        assert list(output.token_ids) == [8]

    run(work())
    assert first.submits == []


def test_the_last_refusal_is_passed_on() -> None:
    coordinators = [ScriptedCoordinator(failing(STATUS_OVERLOADED, name)) for name in ("one", "two")]

    async def work() -> None:
        (output,) = await outputs(CoordinatorPool(coordinators), Submit(max_tokens=1))
        assert (output.status, output.error) == (STATUS_OVERLOADED, "two")

    run(work())


def test_closing_the_generator_cancels_at_the_coordinator() -> None:
    coordinator = ScriptedCoordinator(saying([7] * 9))

    async def work() -> None:
        async with aclosing(CoordinatorPool([coordinator]).generate(Submit(request_id=3, max_tokens=9))) as stream:
            await anext(stream)

    run(work())
    assert coordinator.cancelled == [3]


def test_connecting_needs_one_coordinator() -> None:
    first, second = two()
    first.connected = False

    async def work() -> None:
        pool = CoordinatorPool([first, second])
        await pool.connect()
        assert not pool.all_connected
        second.connected = False
        with pytest.raises(CoordinatorLost):
            await pool.connect()

    run(work())


def test_following_keeps_streams_that_go_on_and_ends_the_others() -> None:
    first, second = two()
    opened: list[str] = []

    def open_one(address: str) -> ScriptedCoordinator:
        opened.append(address)
        return ScriptedCoordinator(saying([9]), address=address)

    async def work() -> None:
        pool = CoordinatorPool([first, second])
        await pool.snapshots()
        await pool.follow(["b:1", "c:1"], open_one)
        assert pool.all_connected
        assert set(await pool.snapshots()) == {"b:1", "c:1"}
        second.inflight_tokens = 10
        (output,) = await outputs(pool, Submit(max_tokens=1))
        assert list(output.token_ids) == [9]

    run(work())
    assert opened == ["c:1"]
    assert (first.connected, second.connected) == (False, True)


def test_snapshots_are_kept_for_a_second() -> None:
    first, second = two()
    second.connected = False
    now = [100.0]

    async def work() -> None:
        pool = CoordinatorPool([first, second], clock=lambda: now[0])
        assert pool.last_snapshots == {}
        assert list(await pool.snapshots()) == ["a:1"], "who does not answer is left out"
        assert await pool.is_ready()
        first.reply = type(first.reply)(state="draining")
        assert await pool.is_ready(), "not asked again yet"
        now[0] += 1.5
        assert not await pool.is_ready()
        assert pool.last_snapshots["a:1"].state == "draining"

    run(work())


def test_a_pool_is_never_empty() -> None:
    with pytest.raises(ValueError, match="at least one"):
        CoordinatorPool([])
