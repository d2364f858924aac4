"""A fleet's processes start, speak, fall silent, fail and are replaced, without leaving anybody behind."""

import asyncio
from typing import Any

import pytest

import actors.supervision.fleet as fleet_module
from actors.supervision.fleet import Fleet, View
from actors.supervision.in_process import InProcessRuntime
from tests.support.front import run


class Process:
    """Says what it is told to say. `silent` answers nothing; `drained` and `stopped` count calls."""

    def __init__(self, *, state: str = "ready", detail: str = "", start_error: str = "", address: str = "a:1") -> None:
        self.told = {"state": state, "detail": detail, "address": address, "node_id": "node-0"}
        self.start_error = start_error
        self.silent = False
        self.starts = self.drained = self.stopped = 0

    async def start(self) -> str:
        self.starts += 1
        if self.start_error:
            raise OSError(self.start_error)
        return self.told["address"]

    async def info(self) -> dict[str, Any]:
        if self.silent:
            await asyncio.Event().wait()
        return self.told

    async def drain(self, _timeout_s: float) -> int:
        self.drained += 1
        return 0

    async def stop(self) -> None:
        self.stopped += 1
        raise ValueError("stop has a defect")


def begin(fleet: Fleet, process_id: str = "one", incarnation: int = 1, **kwargs: Any) -> None:
    fleet.start(process_id, incarnation, Process, kwargs, env={"A": "1"}, node_id="node-0", num_gpus=0.0)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_process_starts_and_is_seen() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        begin(fleet)
        views = await fleet.observe()
        assert views["one"].state == "ready"
        assert views["one"].node_id == "node-0"
        assert runtime.names("space") == ("expert/one/1",)
        assert runtime.names("other") == ()
        assert runtime.spawned[0].env == {"A": "1"}
        assert runtime.spawned[0].target.starts == 1

    run(work())


def test_a_process_that_reports_failure_is_killed_and_its_reason_stays() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        begin(fleet, state="failed", detail="CheckpointError: bad weights")
        for _ in range(3):
            view = (await fleet.observe())["one"]
            assert (view.state, view.detail) == ("dead", "CheckpointError: bad weights")
        assert runtime.names("space") == ()

    run(work())


def test_a_start_that_raises_says_why() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        begin(fleet, start_error="no such port")
        await settle()
        view = (await fleet.observe())["one"]
        assert (view.state, view.detail) == ("dead", "OSError: no such port")
        assert runtime.names("space") == ()

    run(work())


def test_the_next_incarnation_ends_what_is_left_of_the_last() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        begin(fleet)
        await fleet.observe()
        begin(fleet, incarnation=2)
        assert runtime.names("space") == ("expert/one/2",)
        await fleet.stop("one", 1, drain_s=0.0)  # a stop that comes late means the old one
        assert (await fleet.observe())["one"].incarnation == 2

    run(work())


def test_a_stop_in_flight_does_not_end_the_successor() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        begin(fleet)
        await fleet.observe()
        fleet.stop_later("one", 1, drain_s=1.0)
        begin(fleet, incarnation=2)
        await asyncio.gather(*fleet.stopping, return_exceptions=True)
        assert (await fleet.observe())["one"].incarnation == 2
        assert runtime.names("space") == ("expert/one/2",)

    run(work())


def test_a_stop_with_a_defect_still_ends_everybody() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        begin(fleet)
        begin(fleet, "two")
        await fleet.observe()
        await fleet.drain_all(drain_s=1.0)
        targets = [actor.target for actor in runtime.spawned]
        await fleet.stop_all()
        assert [one.drained for one in targets] == [1, 1]
        assert all(one.stopped for one in targets)
        assert runtime.names("space") == ()
        assert fleet.members == {}

    run(work())


def test_one_that_never_spoke_is_stopped_without_waiting_for_it() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        begin(fleet)
        target = runtime.spawned[0].target
        await fleet.drain_all(drain_s=1.0)
        await fleet.stop_all()
        assert target.drained == 0
        assert runtime.names("space") == ()

    run(work())


def test_a_killed_process_is_dead() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        begin(fleet)
        await fleet.observe()
        runtime.spawned[0].kill()
        view = (await fleet.observe())["one"]
        assert view.state == "dead"
        assert "expert/one/1" in view.detail

    run(work())


def test_silence_is_borne_for_a_while_and_then_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "INFO_TIMEOUT_S", 0.01)

    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        begin(fleet)
        await fleet.observe()
        await settle()
        target = runtime.spawned[0].target
        target.silent = True
        for _ in range(fleet_module.MISSES_TO_DEATH - 1):
            assert (await fleet.observe())["one"].state == "ready"
        target.silent = False
        assert (await fleet.observe())["one"].state == "ready"
        target.silent = True
        for _ in range(fleet_module.MISSES_TO_DEATH):
            view = (await fleet.observe())["one"]
        assert view.state == "dead"
        assert "did not answer" in view.detail
        assert runtime.names("space") == ()

    run(work())


def test_a_new_fleet_adopts_the_newest_and_starts_who_was_not_started() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        old = Fleet("space", "expert", runtime)
        for name in ("expert/one/2", "expert/one/10", "expert/stranger/1", "expert/one/x", "coordinator/one/1"):
            runtime.spawn(Process, name=name, namespace="space", kwargs={"address": ""}, env={})
        del old
        fleet = Fleet("space", "expert", runtime)
        fleet.adopt(["one", "absent"])
        assert {name: member.incarnation for name, member in fleet.members.items()} == {"one": 10}
        assert "expert/one/2" not in runtime.names("space")
        assert "expert/stranger/1" in runtime.names("space")
        await fleet.observe()
        await settle()
        found = runtime.find("expert/one/10", "space")
        assert found is not None
        assert found.target.starts == 1

    run(work())


def test_what_a_view_says() -> None:
    assert View("one", 1, None).state == "starting"
    assert View("one", 1, {"state": "loading", "detail": "reading"}).detail == "reading"
    assert View("one", 1, {"state": "ready"}, dead="killed").state == "dead"
