"""What a supervisor does about losses, over real coordinators and experts in one loop: copies, nodes, the head."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import actors.supervision.member as member_module
import actors.supervision.node_watch as node_watch_module
import actors.supervision.supervisor as supervisor_module
from actors.ray_runtime import ActorLost, RuntimeFailure
from actors.supervision.client import SupervisorClient
from actors.supervision.in_process import ONE_NODE, InProcessActor, InProcessRuntime
from actors.supervision.status import ClusterStatus, CopiesStatus
from actors.supervision.supervisor import Supervisor
from cluster.config import ClusterConfig
from tests.support.checkpoints import write_mixtral
from tests.support.front import run
from tests.support.tokenizers import write_byte_tokenizer

TWO_NODES = (ONE_NODE, replace(ONE_NODE, node_id="node-1"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    path.mkdir()
    write_mixtral(path, layers=2, experts=2, dtype=torch.float16)
    write_byte_tokenizer(path)
    return path


@pytest.fixture(autouse=True)
def _quick_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "ROUND_S", 0.02)
    monkeypatch.setattr(supervisor_module, "STARTING_ROUND_S", 0.02)
    monkeypatch.setattr(node_watch_module, "PATIENCE_S", 0.05)


@asynccontextmanager
async def supervised(model: Path, runtime: InProcessRuntime, **changes: Any) -> AsyncIterator[Supervisor]:
    parts: dict[str, Any] = {
        "model": str(model),
        "auth_token": "a-token-of-the-tests",
        "kv_cache_bytes": 1 << 20,
        "namespace": "space",
        "device": "cpu",
        "experts_device": "cpu",
        "coordinator_threads": 1,
    }
    one = Supervisor(config=ClusterConfig(**{**parts, **changes}), runtime=runtime)
    try:
        yield one
    finally:
        runtime.head.set()
        await one.retire()
        await asyncio.gather(*(actor.ended() for actor in runtime.spawned))


async def until(one: Supervisor, holds: Callable[[ClusterStatus], bool], timeout_s: float = 120.0) -> ClusterStatus:
    status = None
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                status = ClusterStatus.from_dict(await one.status())
                if holds(status):
                    return status
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"still not: {status}") from None


def ready(status: ClusterStatus) -> bool:
    return status.state == "ready"


def said(status: ClusterStatus, text: str) -> bool:
    return any(text in event for event in status.events)


def actor_of(runtime: InProcessRuntime, name: str) -> InProcessActor:
    """The newest of that prefix."""
    return [actor for actor in runtime.spawned if actor.name.startswith(name)][-1]


def test_a_lost_copy_is_restored_and_both_are_said(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime(TWO_NODES)
        async with supervised(model, runtime, replicas=2) as one:
            first = await until(one, ready)
            assert first.copies == [CopiesStatus(expert_id=e, ready=2, wanted=2) for e in (0, 1)]
            runtime.head.clear()  # nothing can be started, so that the gap can be seen
            actor_of(runtime, "expert/expert-1-r0/").kill()
            hurt = await until(one, lambda status: status.copies[1].ready == 1)
            assert hurt.state == "degraded"
            assert said(hurt, "expert 1 has 1 of 2 copies")
            runtime.head.set()
            whole = await until(one, ready)
            assert said(whole, "expert 1 has 2 of 2 copies again after ")
            assert whole.copies == first.copies

    run(work())


def test_who_lost_its_only_copy_is_degraded_and_not_starting(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        async with supervised(model, runtime) as one:
            await until(one, ready)
            runtime.head.clear()
            actor_of(runtime, "expert/expert-0-r0/").kill()
            status = await until(one, lambda status: status.copies[0].ready == 0)
            assert status.state == "degraded"
            runtime.head.set()
            await until(one, ready)

    run(work())


def test_while_the_head_is_silent_rounds_go_on_and_start_nothing(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        async with supervised(model, runtime, replicas=2) as one:
            before = await until(one, ready)
            runtime.head.clear()
            await until(one, lambda status: said(status, "head does not answer"))
            started = len(runtime.spawned)
            actor_of(runtime, "expert/expert-0-r1/").kill()
            hurt = await until(one, lambda status: status.map_epoch > before.map_epoch)
            assert {row.map_epoch for row in hurt.coordinators} <= {before.map_epoch, hurt.map_epoch}
            await until(one, lambda status: status.coordinators[0].map_epoch == hurt.map_epoch)
            assert len(runtime.spawned) == started
            assert next(row.detail for row in hurt.replicas if row.replica_id == "expert-0-r1")
            runtime.head.set()
            after = await until(one, ready)
            assert said(after, "head answers again")
            assert len(runtime.spawned) == started + 1

    run(work())


def test_replicas_of_a_lost_node_go_elsewhere_while_the_head_still_lists_it(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime(TWO_NODES)
        async with supervised(model, runtime, replicas=2) as one:
            first = await until(one, ready)
            assert {row.node for row in first.replicas} == {"node-0", "node-1"}
            away = "node-0" if first.coordinators[0].node == "node-1" else "node-1"
            runtime.lost = frozenset({away})
            for actor in runtime.spawned:
                if actor.node_id == away:
                    actor.kill()
            second = await until(one, lambda status: ready(status) and status.map_epoch > first.map_epoch)
            assert {row.node for row in second.replicas} == {first.coordinators[0].node}, "better than no copy"
            pids = [row.address for row in second.replicas]
            runtime.lost = frozenset()
            epoch = second.map_epoch
            await asyncio.sleep(0.2)
            third = await until(one, ready)
            assert (third.map_epoch, [row.address for row in third.replicas]) == (epoch, pids), "nothing moves back"
            actor_of(runtime, "expert/expert-0-r1/").kill()
            fourth = await until(one, lambda status: ready(status) and status.map_epoch > epoch)
            assert {row.node for row in fourth.replicas if row.expert_ids == [0]} == {"node-0", "node-1"}

    run(work())


def test_a_node_where_starts_hang_is_no_trap(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(InProcessRuntime):
        """Who is to start on node-1 is never heard of, until that node is known to be lost."""

        async def aside(self, call: Any) -> Any:
            if getattr(call, "keywords", {}).get("node_id") == "node-1":
                await asyncio.Event().wait()
            return await super().aside(call)

    async def work() -> None:
        runtime = Hanging(TWO_NODES)
        async with supervised(model, runtime, replicas=2) as one:
            with monkeypatch.context() as impatient:
                impatient.setattr(member_module, "SPAWN_TIMEOUT_S", 0.2)
                await until(one, lambda status: said(status, "did not begin"))
            runtime.lost = frozenset({"node-1"})
            status = await until(one, ready)
            assert {row.node for row in status.replicas} == {"node-0"}

    run(work())


def quarantine(runtime: InProcessRuntime, replica_id: str) -> None:
    """Makes the coordinator report that replica as it is now, as long as its map has it so."""
    coordinator = actor_of(runtime, "coordinator/").target
    true_info = coordinator.info
    victim = actor_of(runtime, f"expert/{replica_id}/")

    async def info() -> dict[str, Any]:
        state = "healthy" if victim.target is None else "quarantined"
        row = {"replica_id": replica_id, "state": state, "detail": "NaN in layer 1", "ejections_total": 0}
        return {**await true_info(), "replica_health": [row]}

    coordinator.info = info


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_quarantined_replica_is_replaced(model: Path, replicas: int) -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        async with supervised(model, runtime, replicas=replicas) as one:
            first = await until(one, ready)
            quarantine(runtime, "expert-1-r0")
            stopping = "stopping expert-1-r0: quarantined by coordinator-0: NaN in layer 1"
            again = "starting expert-1-r0 again (incarnation 2): quarantined by coordinator-0"
            await until(one, lambda status: ready(status) and said(status, stopping) and said(status, again))
            assert bool(replicas == 1) == any("stand-in" in actor.name for actor in runtime.spawned)
            last = await until(one, lambda status: ready(status) and len(status.replicas) == 2 * replicas)
            assert [row.replica_id for row in last.replicas] == [row.replica_id for row in first.replicas]

    run(work())


def test_an_orderly_stop_is_told_to_whoever_waits_for_the_end(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        async with supervised(model, runtime) as one:
            await until(one, ready)
            waiting = [asyncio.create_task(actor.target.ended()) for actor in runtime.spawned]
            assert len(waiting) == 3
            done, _ = await asyncio.wait(waiting, timeout=0.05)
            assert not done
        await asyncio.gather(*waiting)

    run(work())


def test_a_supervisor_that_is_away_is_said_in_words() -> None:
    class Away:
        name = "supervisor"

        def call_sync(self, method: str, *_args: Any, timeout_s: float) -> Any:
            raise ActorLost(f"{self.name}: {method} within {timeout_s:g} s? The actor is unavailable")

    with pytest.raises(RuntimeFailure, match="the supervisor is away; what serves goes on"):
        SupervisorClient(Away()).status()  # type: ignore[arg-type]  # the one method that is asked
