"""Hosts under Ray's own autoscaler: a hot expert makes a node appear, and when it cools a node goes.

Real are Ray, its autoscaler v2, the nodes' raylets, the expert processes, and the policy; its observations are made up.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors import ray_runtime
from actors.expert.actor import ExpertActor
from actors.supervision.blueprint import process_env
from actors.supervision.fleet import Fleet
from actors.supervision.hosts import RayHosts
from actors.supervision.node_watch import NodeWatch
from cluster.config import ClusterConfig
from cluster.ids import NodeId
from cluster.layout import FloatArray, Grain, Host, Layout
from cluster.placement import COORDINATOR_HOST, EXPERT_HOST
from cluster.policy import Action, AddHosts, Copy, DrainHost, Drop, KeepHost, Observation, RemoveHost
from tests.support.autoscaling_ray import AutoscalingRay
from tests.support.checkpoints import write_mixtral
from tests.support.front import run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SPACE = "hosts-test"
TOKEN = "a-token-for-tests-only"
GRAIN = Grain.even(2, 4, layer_bytes=10)
SLOTS = 2
IDLE_TIMEOUT_S = 3.0
# The policy's clock runs faster than Ray's nodes start, so that its windows are worth waiting for here.
SPEED = 10.0


@pytest.fixture(scope="module")
def ray() -> Iterator[AutoscalingRay]:
    ray_runtime.disconnect()
    ray_runtime.start_local(SPACE)  # Ray remembers of a process's first cluster that it had no autoscaler
    ray_runtime.disconnect()
    one = AutoscalingRay(
        {"CPU": 1, EXPERT_HOST: 1}, head={COORDINATOR_HOST: 1}, max_workers=3, idle_timeout_s=IDLE_TIMEOUT_S
    )
    try:
        ray_runtime.connect(one.address, SPACE)
        yield one
    finally:
        ray_runtime.disconnect()
        one.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    path.mkdir()
    write_mixtral(path, layers=2, experts=4, dtype=torch.float16)
    return path


class Story:
    """A balancing loop in small: looks, asks the policy, and does what it says, one action after another."""

    def __init__(self, model: Path) -> None:
        config = ClusterConfig(
            model=str(model),
            min_expert_hosts=2,
            max_expert_hosts=3,
            host_timeout_s=9000.0,
            scale_up_s=5.0,
            scale_down_s=40.0,
        )
        limits = config.host_limits
        assert limits is not None
        self.said: list[str] = []
        self.hosts = RayHosts(ray_runtime, limits, self.said.append)
        self.nodes = NodeWatch(ray_runtime)
        self.fleet = Fleet(SPACE, "expert")
        self.policy = config.policy("incremental", budget_bytes=10_000)
        self.replicas: dict[tuple[int, NodeId], str] = {}
        self.log: list[Action] = []
        self._model, self._state, self._made = str(model), None, 0
        self._failed: tuple[Action, ...] = ()

    @property
    def present(self) -> list[NodeId]:
        return sorted(one.node_id for one in self.nodes.slots if EXPERT_HOST in one.roles)

    @property
    def layout(self) -> Layout:
        on = [
            Host(node_id=name, slots=SLOTS, memory_bytes=1 << 40, draining=name in self.hosts.draining)
            for name in self.present
            if name not in self.hosts.leaving
        ]
        held = np.zeros((GRAIN.num_units, len(on)), np.bool_)
        for column, host in enumerate(on):
            held[[unit for unit, node_id in self.replicas if node_id == host.node_id], column] = True
        return Layout(GRAIN, tuple(on), held)

    async def look(self) -> None:
        await self.nodes.look()
        await self.hosts.look(self.nodes.slots, head_silent=self.nodes.head_silent)

    async def round(self, work_LE: FloatArray) -> None:
        await self.look()
        now_s = time.monotonic() * SPEED
        seen = Observation(now_s=now_s, layout=self.layout, work_LE=work_LE, failed=self._failed)
        actions, self._state = self.policy(seen, self._state)
        for action in actions:
            self.log.append(action)
            await self._do(action)

    async def until(self, holds: Callable[[], bool], work_LE: FloatArray | None = None) -> None:
        async with asyncio.timeout(240):
            while not holds():
                await (self.look() if work_LE is None else self.round(work_LE))
                await asyncio.sleep(0.2)

    async def _do(self, action: Action) -> None:
        match action:
            case Copy(unit=unit, node_id=node_id):
                await self._copy(unit, node_id)
            case Drop(unit=unit, node_id=node_id):
                name = self.replicas.pop((unit, node_id))
                await self.fleet.stop(name, 1, drain_s=1.0)
            case AddHosts(num=num):
                await self.hosts.add(num)
            case DrainHost(node_id=node_id):
                await self.hosts.drain(node_id)
            case KeepHost(node_id=node_id):
                await self.hosts.keep(node_id)
            case RemoveHost(node_id=node_id):
                await self.hosts.remove(node_id)

    async def _copy(self, unit: int, node_id: NodeId) -> None:
        """A real replica on that node, once it is ready."""
        self._made += 1
        name = f"expert-{unit}-{self._made}"
        kwargs: dict[str, Any] = {
            "replica_id": name,
            "expert_ids": [int(GRAIN.expert(unit))],
            "first_layer": 0,
            "num_layers": GRAIN.num_layers,
            "model": self._model,
            "kernel": "auto",
            "device": "cpu",
            "auth_token": TOKEN,
        }
        self.fleet.start(name, 1, ExpertActor, kwargs, env=process_env(1), node_id=node_id, num_gpus=0.0)
        async with asyncio.timeout(200):
            while (await self.fleet.observe())[name].state != "ready":
                assert self.fleet.members[name].view.dead is None, self.fleet.members[name].view
                await asyncio.sleep(0.1)
        self.replicas[unit, node_id] = name

    async def serving(self) -> dict[str, str]:
        """Nodes of the replicas that answer."""
        views = await self.fleet.observe()
        return {name: str(view.node_id) for name, view in views.items() if view.state == "ready"}


def work(hot: float, others: float) -> FloatArray:
    """Of each expert over both layers, in shares of one host's time."""
    work_LE = np.full((2, 4), others / 2)
    work_LE[:, 1] = hot / 2
    return work_LE


def test_a_hot_expert_makes_a_node_appear_and_its_cooling_makes_one_go(ray: AutoscalingRay, model: Path) -> None:
    async def act() -> None:
        story = Story(model)
        await story.until(lambda: len(story.present) == 2)  # the least, asked for at the first look
        await story.round(work(0.2, 0.2))
        assert len(story.replicas) == 4
        for _ in range(3):
            await story.round(work(0.2, 0.2))
        assert story.hosts.level == 2

        before = set(story.present)
        await story.until(lambda: len(story.present) == 3, work(1.6, 0.1))
        new = (set(story.present) - before).pop()
        assert any(isinstance(one, AddHosts) for one in story.log)
        await story.until(lambda: (1, new) in story.replicas, work(1.6, 0.1))
        assert (await story.serving())[story.replicas[1, new]] == new
        assert story.hosts.level == 3

        for _ in range(int(2 * IDLE_TIMEOUT_S / 0.2)):  # longer than a node may be idle: this one is at work
            await story.look()
            await asyncio.sleep(0.2)
        assert new in story.present

        await story.until(lambda: len(story.present) == 2, work(0.02, 0.02))
        gone = ({*before, new} - set(story.present)).pop()
        assert RemoveHost(node_id=gone, reason="it is drained") in story.log
        assert (story.hosts.level, story.hosts.leaving, await story.hosts.pending()) == (2, frozenset(), 0)
        serving = await story.serving()
        assert set(serving.values()) <= set(story.present)
        assert {unit for unit, _ in story.replicas} == {0, 1, 2, 3}
        assert set(story.replicas.values()) == set(serving)
        await story.fleet.stop_all()

    run(act(), timeout_s=840)
