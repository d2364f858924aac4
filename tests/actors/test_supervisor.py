"""A supervisor over real coordinators and experts, all in one event loop: it starts, mends, adopts, gives up, ends."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import actors.supervision.node_watch as node_watch_module
import actors.supervision.supervisor as supervisor_module
from actors.ray_runtime import RayNode, RuntimeFailure
from actors.supervision.client import SUPERVISOR_NAME, SupervisorClient, find_supervisor
from actors.supervision.in_process import ONE_NODE, InProcessRuntime
from actors.supervision.launch import ensure_cluster
from actors.supervision.status import ClusterStatus
from actors.supervision.supervisor import Supervisor
from cluster.config import ClusterConfig
from tests.support.checkpoints import write_mixtral
from tests.support.front import run
from tests.support.tokenizers import write_byte_tokenizer

TOKEN = "a-token-of-the-tests"


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


def config_of(model: Path, **changes: Any) -> ClusterConfig:
    parts: dict[str, Any] = {"model": str(model), "auth_token": TOKEN, "kv_cache_bytes": 1 << 20, "namespace": "space"}
    return ClusterConfig(**{**parts, "device": "cpu", "experts_device": "cpu", "coordinator_threads": 1, **changes})


@asynccontextmanager
async def supervised(config: ClusterConfig, runtime: InProcessRuntime) -> AsyncIterator[Supervisor]:
    one = Supervisor(config=config, runtime=runtime)
    try:
        yield one
    finally:
        runtime.head.set()
        await one.retire()
        await asyncio.gather(*(actor.ended() for actor in runtime.spawned))


async def until(one: Supervisor, holds: Callable[[ClusterStatus], bool], timeout_s: float = 120.0) -> ClusterStatus:
    async with asyncio.timeout(timeout_s):
        while True:
            status = ClusterStatus.from_dict(await one.status())
            if holds(status):
                return status
            await asyncio.sleep(0.02)


def ready(status: ClusterStatus) -> bool:
    return status.state == "ready"


def test_it_starts_mends_and_ends_a_cluster(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        async with supervised(config_of(model), runtime) as one:
            assert await one.endpoints() is None
            first = await until(one, ready)
            assert [row.replica_id for row in first.replicas] == ["expert-0-r0", "expert-1-r0"]
            assert {row.kernel for row in first.replicas} == {"fp16"}
            assert first.coordinators[0].map_epoch == first.map_epoch
            endpoints = await one.endpoints()
            assert endpoints is not None
            assert endpoints["coordinators"] == (first.coordinators[0].address,)
            assert endpoints["served_model_name"] == "tiny"
            assert {actor.env["OMP_NUM_THREADS"] for actor in runtime.spawned} == {"1"}

            victim = runtime.find("expert/expert-1-r0/1", "space")
            assert victim is not None
            victim.kill()
            after = await until(one, lambda status: ready(status) and status.map_epoch > first.map_epoch)
            assert after.replicas[1].address != first.replicas[1].address
            assert any("expert-1-r0 again" in event for event in after.events)
            assert after.system_fingerprint == first.system_fingerprint
        assert runtime.names("space") == ()

    run(work())


def test_a_new_supervisor_adopts_and_goes_on_from_the_newest_epoch(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        old = Supervisor(config=config_of(model), runtime=runtime)
        first = await until(old, ready)
        old._loop.cancel()  # its process dies; the actors stay
        await asyncio.gather(old._loop, return_exceptions=True)
        started = len(runtime.spawned)
        async with supervised(config_of(model), runtime) as new:
            second = await until(new, ready)
            assert second.map_epoch > first.map_epoch
            assert len(runtime.spawned) == started
            assert [row.address for row in second.replicas] == [row.address for row in first.replicas]
        await old._publisher.close()

    run(work())


def test_weights_that_cannot_be_read_end_in_one_reason(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    async def work() -> None:
        runtime = InProcessRuntime()
        async with supervised(config_of(tmp_path), runtime) as one:
            (tmp_path / "model.safetensors").unlink()
            status = await until(one, lambda status: any(row.state == "failed" for row in status.replicas))
            assert status.state == "starting"
            assert "CheckpointError" in next(row.detail for row in status.replicas if row.state == "failed")
            with pytest.raises(RuntimeFailure, match="cannot start: "):
                await one.endpoints()
        assert runtime.names("space") == ()

    run(work())


def test_an_ingress_is_told_of_those_that_serve_while_another_is_away(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        async with supervised(config_of(model, coordinators=2), runtime) as one:
            both = await until(one, ready)
            victim = runtime.find("coordinator/coordinator-0/1", "space")
            assert victim is not None
            runtime.head.clear()  # nothing can be started, so that the gap can be seen
            victim.kill()
            await until(one, lambda status: status.coordinators[0].state != "ready")
            assert (await one.status())["state"] == "degraded"
            endpoints = await one.endpoints()
            assert endpoints is not None
            assert endpoints["coordinators"] == (both.coordinators[1].address,)
            assert endpoints["max_model_len"] == both.coordinators[1].max_model_len > 0
            assert endpoints["system_fingerprint"] == both.system_fingerprint
            runtime.head.set()
            again = await until(one, ready)
            endpoints = await one.endpoints()
            assert endpoints is not None
            assert endpoints["coordinators"] == tuple(row.address for row in again.coordinators)

    run(work())


def test_a_cluster_that_was_ready_waits_for_what_falls_again_and_again(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        async with supervised(config_of(model), runtime) as one:
            await until(one, ready)
            for incarnation in (1, 2, 3):
                victim = runtime.find(f"coordinator/coordinator-0/{incarnation}", "space")
                assert victim is not None
                runtime.head.clear()  # the next one cannot be there before anybody has looked
                victim.kill()
                await until(one, lambda status: status.coordinators[0].state != "ready")
                assert await one.endpoints() is None  # no failure: the front door waits
                runtime.head.set()
                await until(one, ready)

    run(work())


def test_replicas_that_fit_nowhere_are_said(model: Path) -> None:
    async def work() -> None:
        small = replace(ONE_NODE, memory_bytes=1)
        async with supervised(config_of(model), InProcessRuntime((small,))) as one:
            status = await until(one, lambda status: status.replicas[0].state == "unplaced")
            assert "memory_bytes" in status.replicas[0].detail
            assert status.state == "starting"

    run(work())


def test_draining_is_shown_and_nothing_is_restarted(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        async with supervised(config_of(model), runtime) as one:
            await until(one, ready)
            await one.drain(1.0)
            assert (await one.status())["state"] == "draining"
            started = len(runtime.spawned)
            runtime.spawned[0].kill()
            await asyncio.sleep(0.1)
            assert len(runtime.spawned) == started

    run(work())


def test_the_cluster_is_launched_once(model: Path) -> None:
    class Launching(InProcessRuntime):
        """A supervisor made by name gets this runtime, as in a real cluster it gets Ray."""

        def spawn(self, actor_class: type, **options: Any) -> Any:
            if actor_class is Supervisor:
                options["kwargs"] = {**options["kwargs"], "runtime": self}
            return super().spawn(actor_class, **options)

    async def work() -> None:
        runtime: Any = Launching()
        config = replace(config_of(model), auth_token=None)
        assert find_supervisor("space", runtime) is None
        one, two = await asyncio.gather(ensure_cluster(config, runtime), ensure_cluster(config, runtime))
        assert one == two
        assert len(one.credentials.token) >= 32
        assert one.model_path == str(model)
        assert isinstance(find_supervisor("space", runtime), SupervisorClient)
        actor = runtime.find(SUPERVISOR_NAME, "space")
        assert sum(spawned.name == SUPERVISOR_NAME for spawned in runtime.spawned) == 1
        await actor.call("retire", timeout_s=120.0)
        actor.kill()
        assert runtime.names("space") == ()
        await asyncio.gather(*(spawned.ended() for spawned in runtime.spawned))

    run(work())


def test_nodes_are_values() -> None:
    node = RayNode("n", "1.2.3.4", 1.0, 0.0, 1, {})
    assert InProcessRuntime((node,)).nodes() == (node,)
