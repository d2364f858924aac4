"""The one module over Ray's core, with trivial actors: started, named, found, killed, refused, and what they say."""

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ray.serve._private import constants as serve_constants

from actors import local_ray, ray_runtime
from actors.ray_runtime import ActorLost, ActorRef
from actors.supervision.fleet import Fleet
from actors.supervision.member import View
from tests.support.front import run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SPACE = "runtime-test"


class Process:
    """What a fleet expects of a process; `broken` fails in the constructor, `bad_start` in `start`."""

    def __init__(self, *, broken: bool = False, bad_start: bool = False) -> None:
        if broken:
            raise ValueError("broken in its constructor")
        self.bad_start = bad_start
        self.address = ""

    async def start(self) -> str:
        if self.bad_start:
            raise OSError("no such port")
        self.address = "a:1"
        return self.address

    async def info(self) -> dict[str, Any]:
        loops = [getattr(serve_constants, variable) for variable in local_ray.ONE_LOOP]
        facts = {"pid": os.getpid(), "color": os.environ.get("COLOR"), "loops_of_their_own": any(loops)}
        return {"state": "ready", "detail": "", "address": self.address, "node_id": "", **facts}

    async def ended(self) -> None:
        await asyncio.Event().wait()

    async def wait(self) -> None:
        await asyncio.Event().wait()

    async def drain(self, _timeout_s: float) -> int:
        return 0

    async def stop(self) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """A Ray of this module's own; no other may be joined."""
    ray_runtime.disconnect()
    ray_runtime.start_local(SPACE)
    yield
    ray_runtime.disconnect()


def begin(fleet: Fleet, name: str, **kwargs: Any) -> None:
    node_id = ray_runtime.nodes()[0].node_id
    fleet.start(name, 1, Process, kwargs, env={"COLOR": "red"}, node_id=node_id, num_gpus=0.0)


async def look(fleet: Fleet, name: str, *states: str) -> View:
    async with asyncio.timeout(120):
        while True:
            view = (await fleet.observe()).get(name)
            if view is not None and view.state in states:
                return view
            await asyncio.sleep(0.05)


def ask_on(actor: ActorRef) -> None:
    """Asks one that was killed until it is gone: a kill goes by Ray's head, a call does not and may still be answered.

    Raises what a call raises then.
    """
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        actor.call_sync("info", timeout_s=60.0)


def test_started_named_adopted_and_killed() -> None:
    async def work() -> None:
        fleet = Fleet(SPACE, "expert")
        begin(fleet, "one")
        first = await look(fleet, "one", "ready")
        assert first.info is not None
        assert first.info["color"] == "red"
        assert not first.info["loops_of_their_own"], "Ray Serve's processes are started alike"
        assert first.info["pid"] != os.getpid()
        assert first.node_id == ray_runtime.own_node_id()
        assert "expert/one/1" in ray_runtime.names(SPACE)

        heir = Fleet(SPACE, "expert")
        await heir.adopt()
        second = await look(heir, "one", "ready")
        assert second.info is not None
        assert second.info["pid"] == first.info["pid"]
        with pytest.raises(TimeoutError, match=r"expert/one/1\.wait did not answer within 0\.1 s"):
            await heir.members["one"].actor.call("wait", timeout_s=0.1)
        os.kill(first.info["pid"], 9)
        assert "expert/one/1" in (await look(heir, "one", "dead")).detail
        await heir.stop_all()
        assert ray_runtime.find("expert/one/1", SPACE) is None

    run(work())


def test_what_keeps_an_actor_from_starting_is_said() -> None:
    async def work() -> None:
        fleet = Fleet(SPACE, "expert")
        begin(fleet, "two", broken=True)
        begin(fleet, "three", bad_start=True)
        assert (await look(fleet, "two", "dead")).detail.endswith("ValueError: broken in its constructor")
        assert (await look(fleet, "three", "dead")).detail == "OSError: no such port"
        three = fleet.members["three"].actor
        assert isinstance(three, ActorRef)
        with pytest.raises(ActorLost):
            await asyncio.to_thread(ask_on, three)
        with pytest.raises(ActorLost):
            await three.call("info", timeout_s=60.0)
        await fleet.stop_all()

    run(work())


def test_one_name_is_one_actor_and_calls_from_threads_fail_alike() -> None:
    options: dict[str, Any] = {"name": "four", "namespace": SPACE, "env": {}}
    one = ray_runtime.spawn(Process, kwargs={"bad_start": True}, **options)
    two = ray_runtime.spawn(Process, kwargs={}, **options)
    assert one.call_sync("info", timeout_s=60.0)["pid"] == two.call_sync("info", timeout_s=60.0)["pid"]
    with pytest.raises(OSError, match="no such port"):
        one.call_sync("start", timeout_s=60.0)
    with pytest.raises(TimeoutError, match=r"four\.wait did not answer"):
        one.call_sync("wait", timeout_s=0.1)
    one.kill()
    one.kill()
    with pytest.raises(ActorLost, match="four"):
        ask_on(two)


class Subscriber:
    """A poll that has nothing to wait for returns at once; `polls` counts them."""

    def __init__(self) -> None:
        self.polls = self.closed = 0
        self.found: Any = None
        self.polled = threading.Event()

    def poll(self, timeout: float | None = None) -> tuple[None, Any]:
        self.polls += 1
        self.polled.set()
        return None, self.found

    def close(self) -> None:
        self.closed += 1


def test_a_driver_whose_head_is_away_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runtime, "POLL_PAUSE_S", 200.0)
    inner = Subscriber()
    paced = ray_runtime._PacedSubscriber(inner)
    inner.found = "an error"
    assert paced.poll() == (None, "an error")
    inner.found = None
    inner.polled.clear()
    polling = threading.Thread(target=paced.poll)
    polling.start()
    assert inner.polled.wait(60)
    polling.join(0.2)
    assert polling.is_alive()
    paced.close()
    polling.join(60)
    assert not polling.is_alive()
    assert (inner.polls, inner.closed) == (2, 1)
