"""A fleet's processes start, speak, fall silent, fail and are replaced, without leaving anybody behind."""

import asyncio
import math
from typing import Any

import pytest

import actors.supervision.fleet as fleet_module
import actors.supervision.member as member_module
from actors.ray_runtime import ActorUnreachable
from actors.supervision.fleet import Fleet
from actors.supervision.in_process import InProcessRuntime
from actors.supervision.member import View
from cluster.liveness import LivenessPolicy
from tests.support.front import run
from tests.support.idle_clock import run_idle


class Process:
    """Says what it is told to say. `silent` answers nothing; `drained` and `stopped` count calls."""

    def __init__(self, *, state: str = "ready", detail: str = "", start_error: str = "", address: str = "a:1") -> None:
        self.told = {"state": state, "detail": detail, "address": address, "node_id": "node-0"}
        self.start_error = start_error
        self.silent = False
        self.starts = self.drained = self.stopped = 0
        self.end = asyncio.Event()

    async def start(self) -> str:
        self.starts += 1
        if self.start_error:
            raise OSError(self.start_error)
        return self.told["address"]

    async def info(self) -> dict[str, Any]:
        if self.silent:
            await asyncio.Event().wait()
        return self.told

    async def ended(self) -> None:
        await self.end.wait()

    async def drain(self, _timeout_s: float, end_rest: bool = False) -> int:
        self.drained += 1
        return 0

    async def stop(self) -> None:
        self.stopped += 1
        raise ValueError("stop has a defect")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who answers is heard, however slow the machine is."""
    monkeypatch.setattr(member_module, "INFO_TIMEOUT_S", 200.0)
    monkeypatch.setattr(fleet_module, "OBSERVE_S", 200.0)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def begin(fleet: Fleet, process_id: str = "one", incarnation: int = 1, **kwargs: Any) -> None:
    fleet.start(process_id, incarnation, Process, kwargs, env={"A": "1"}, node_id="node-0", num_gpus=0.0)
    await settle()


def test_a_process_starts_and_is_seen() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        await begin(fleet)
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
        await begin(fleet, state="failed", detail="CheckpointError: bad weights")
        for _ in range(3):
            view = (await fleet.observe())["one"]
            assert (view.state, view.detail) == ("dead", "CheckpointError: bad weights")
        assert runtime.names("space") == ()

    run(work())


def test_a_start_that_raises_says_why() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        await begin(fleet, start_error="no such port")
        await settle()
        view = (await fleet.observe())["one"]
        assert (view.state, view.detail) == ("dead", "OSError: no such port")
        assert runtime.names("space") == ()

    run(work())


def test_the_next_incarnation_ends_what_is_left_of_the_last() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        await begin(fleet)
        await fleet.observe()
        await begin(fleet, incarnation=2)
        assert runtime.names("space") == ("expert/one/2",)
        await fleet.stop("one", 1, drain_s=0.0)  # a stop that comes late means the old one
        assert (await fleet.observe())["one"].incarnation == 2

    run(work())


def test_a_stop_in_flight_does_not_end_the_successor() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        await begin(fleet)
        await fleet.observe()
        fleet.stop_later("one", 1, drain_s=1.0)
        await begin(fleet, incarnation=2)
        await asyncio.gather(*fleet.stopping, return_exceptions=True)
        assert (await fleet.observe())["one"].incarnation == 2
        assert runtime.names("space") == ("expert/one/2",)

    run(work())


def test_a_stop_with_a_defect_still_ends_everybody() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        await begin(fleet)
        await begin(fleet, "two")
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
        await begin(fleet)
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
        await begin(fleet)
        await fleet.observe()
        runtime.spawned[0].kill()
        view = (await fleet.observe())["one"]
        assert view.state == "dead"
        assert "expert/one/1" in view.detail

    run(work())


def test_silence_is_borne_for_a_while_and_then_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet(
            "space", "expert", runtime, liveness=LivenessPolicy(silence_s=math.inf, silence_when_away_s=0.001)
        )
        await begin(fleet)
        await fleet.observe()
        await settle()
        target = runtime.spawned[0].target
        target.silent = True
        monkeypatch.setattr(member_module, "INFO_TIMEOUT_S", 0.01)
        for _ in range(20):
            assert (await fleet.observe())["one"].state == "ready"
        target.silent = False
        monkeypatch.setattr(member_module, "INFO_TIMEOUT_S", 200.0)
        await fleet.observe()
        assert (await fleet.observe(away=["one"]))["one"].state == "ready", "what others say is not enough"
        target.silent = True
        monkeypatch.setattr(member_module, "INFO_TIMEOUT_S", 0.01)
        await fleet.observe(away=["another"])
        view = (await fleet.observe(away=["one"]))["one"]
        assert view.state == "dead"
        assert "did not answer" in view.detail
        assert runtime.names("space") == ()

    run(work())


def test_who_cannot_be_reached_may_yet_live(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        await begin(fleet)
        await fleet.observe()
        actor = runtime.spawned[0]

        async def call(_method: str, *_args: Any, timeout_s: float) -> Any:
            raise ActorUnreachable(f"nobody answered within {timeout_s:g} s")

        monkeypatch.setattr(actor, "call", call)
        assert (await fleet.observe())["one"].state == "ready"
        assert (await fleet.observe(lost_nodes={"node-0"}))["one"].detail == "its node does not answer"
        assert runtime.names("space") == ()

    run(work())


def test_a_new_fleet_adopts_the_newest_of_its_kind_and_starts_who_was_not_started() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        for name in ("expert/one/2", "expert/one/10", "expert/two/1", "expert/one/x", "coordinator/one/1"):
            runtime.spawn(Process, name=name, namespace="space", kwargs={"address": ""}, env={})
        fleet = Fleet("space", "expert", runtime)
        await fleet.adopt()
        assert {name: member.incarnation for name, member in fleet.members.items()} == {"one": 10, "two": 1}
        assert "expert/one/2" not in runtime.names("space")
        assert {"expert/one/x", "coordinator/one/1"} <= set(runtime.names("space"))
        await fleet.observe()
        await settle()
        found = runtime.find("expert/one/10", "space")
        assert found is not None
        assert found.target.starts == 1
        assert (await fleet.observe())["one"].state == "ready"

    run(work())


def test_who_is_slow_to_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        await begin(fleet, "slow")
        await begin(fleet, "quick")
        await fleet.observe()
        runtime.spawned[0].target.silent = True
        runtime.spawned[1].kill()
        monkeypatch.setattr(fleet_module, "OBSERVE_S", 0.01)
        views = await fleet.observe()
        assert (views["slow"].state, views["quick"].state) == ("ready", "dead")

    run(work())


def test_the_end_of_a_process_is_told_at_once() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        await begin(fleet)
        await fleet.observe()
        await settle()
        fleet.changed.clear()
        runtime.spawned[0].kill()
        await fleet.changed.wait()
        assert (await fleet.observe())["one"].state == "dead"

    run(work())


def test_a_spawn_that_hangs_is_given_up_and_whoever_comes_late_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_module, "SPAWN_TIMEOUT_S", 2.0)

    async def work() -> None:
        runtime = InProcessRuntime()
        runtime.head.clear()
        fleet = Fleet("space", "expert", runtime)
        await begin(fleet)
        assert (await fleet.observe())["one"].state == "starting"
        await fleet.changed.wait()
        view = (await fleet.observe())["one"]
        assert (view.state, view.detail) == ("dead", "RuntimeFailure: Ray did not begin to start it within 2 s")
        runtime.head.set()
        await settle()
        assert len(runtime.spawned) == 1
        assert runtime.names("space") == ()

    run_idle(work())


def test_who_is_stopped_while_being_made_does_not_live() -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        runtime.head.clear()
        fleet = Fleet("space", "expert", runtime)
        await begin(fleet)
        stopping = asyncio.create_task(fleet.stop_all())
        await settle()
        runtime.head.set()
        await stopping
        assert len(runtime.spawned) == 1
        assert runtime.names("space") == ()

    run(work())


def test_who_starts_on_a_node_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        fleet = Fleet("space", "expert", runtime)
        await begin(fleet)
        await begin(fleet, "two")
        await fleet.observe()
        runtime.spawned[1].target.silent = True
        await begin(fleet, "three")
        monkeypatch.setattr(fleet_module, "OBSERVE_S", 0.01)
        views = await fleet.observe(lost_nodes={"node-0"})
        assert views["three"].detail == "its node does not answer"
        assert views["one"].state == "ready"
        assert (await fleet.observe(lost_nodes={"elsewhere"}))["one"].state == "ready"

    run(work())


def test_what_a_view_says() -> None:
    assert View("one", 1, None).state == "starting"
    assert View("one", 1, {"state": "loading", "detail": "reading"}).detail == "reading"
    assert View("one", 1, {"state": "ready"}, dead="killed").state == "dead"
