"""A cluster without Ray: real expert, coordinator and front processes, a map that the row publishes, fault proxies.

Nobody restarts what dies here: this kind is for faults of the network and of the map.
"""

import asyncio
import random
import time
from asyncio.subprocess import Process as Child
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.channels import WireCredentials, open_channel
from actors.front.coordinator_client import CoordinatorClient
from actors.map_wire import map_to_wire
from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from model.storage.config_reader import read_config
from protos.coordinator_pb2_grpc import CoordinatorServiceStub
from protos.expert_pb2 import STATUS_OK
from tests.chaos.clusters import (
    COUNTS,
    MODEL_ID,
    WHOLE_TIMEOUT_S,
    Counters,
    NotWhole,
    Process,
    alive,
    sum_counters,
    unhealthy,
)
from tests.chaos.plain_process import spawn
from tests.chaos.proxy import FaultProxy, Weather, fault_proxy
from tests.support import expert_process

TOKEN = "a-token-for-tests-only"
KV_BYTES = 1 << 28
READY_TIMEOUT_S = 180.0
POLL_S = 0.1


@dataclass(frozen=True)
class Plain:
    """Needs `copies` replicas of `groups` equal groups of experts, each a process, and one coordinator.

    `proxied` puts a FaultProxy before each replica and makes rows travel by gRPC; else by whatever is agreed on.
    """

    copies: int = 2
    groups: int = 2
    proxied: bool = True
    seed: int = 0

    @asynccontextmanager
    async def open(self, model: Path, home: Path) -> AsyncIterator["PlainChaos"]:
        """Starts everything; the coordinator's map names the proxies."""
        async with AsyncExitStack() as stack:
            members = await asyncio.gather(
                *(
                    _expert(stack, model, self, group, copy)
                    for group in range(self.groups)
                    for copy in range(self.copies)
                )
            )
            proxies: dict[str, FaultProxy] = {}
            if self.proxied:
                for member in members:
                    rng = random.Random(f"{self.seed}/{member.info.replica_id}")
                    proxy = await stack.enter_async_context(fault_proxy(member.info.address, rng))
                    proxies[member.info.replica_id] = proxy
            config = {
                "model": str(model),
                "device": "cpu",
                "coordinator_threads": 1,
                "kv_cache_bytes": KV_BYTES,
                "transport": "grpc" if self.proxied else "auto",
            }
            child, address = await spawn("coordinator", home / "coordinator.log", auth_token=TOKEN, config=config)
            stack.push_async_callback(expert_process.end, child)
            client = CoordinatorClient(address, WireCredentials(TOKEN))
            stack.push_async_callback(client.close)
            cluster = PlainChaos(model, list(members), proxies, child, client)
            await cluster.publish(one.info.replica_id for one in members)
            front, cluster.url = await spawn(
                "front",
                home / "front.log",
                auth_token=TOKEN,
                model=str(model),
                coordinator=address,
                max_model_len=await cluster.ready(),
                model_id=MODEL_ID,
            )
            stack.push_async_callback(expert_process.end, front)
            yield cluster


@dataclass(frozen=True, slots=True)
class _Member:
    info: ReplicaInfo
    child: Child


class PlainChaos:
    """See `tests.chaos.clusters.Cluster`; besides, `proxies` by replica id, and `publish`."""

    def __init__(
        self,
        model: Path,
        members: list[_Member],
        proxies: dict[str, FaultProxy],
        coordinator: Child,
        client: CoordinatorClient,
    ) -> None:
        self.url = ""
        self.model_id = MODEL_ID
        self.proxies = proxies
        self._shape = read_config(model)
        self._members = members
        self._coordinator = coordinator
        self._client = client
        self._epoch = 0

    @property
    def replica_ids(self) -> list[str]:
        """All that run, in the map or not."""
        return [one.info.replica_id for one in self._members]

    def turn(self, weather: Weather, replica_ids: Collection[str] | None = None) -> None:
        """Weather at these replicas, or at all."""
        for replica_id, proxy in self.proxies.items():
            if replica_ids is None or replica_id in replica_ids:
                proxy.turn(weather)

    async def publish(self, replica_ids: Any) -> None:
        """A new map of these replicas only."""
        wanted = set(replica_ids)
        self._epoch += 1
        replicas = tuple(self._in_map(one.info) for one in self._members if one.info.replica_id in wanted)
        new = ExpertMap(self._epoch, self._shape.num_layers, self._shape.num_experts, replicas)
        async with open_channel(self._client.address, WireCredentials(TOKEN)) as channel:
            stub = CoordinatorServiceStub(channel)  # type: ignore[no-untyped-call]
            reply = await stub.PublishMap(map_to_wire(new), timeout=60)
        assert reply.status == STATUS_OK, reply.detail

    async def ready(self) -> int:
        """Waits for the coordinator; returns the longest sequence that it takes."""
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while (reply := await self._client.snapshot()).state != "ready":
            assert reply.state != "failed", reply.detail
            assert time.monotonic() < deadline_s, f"the coordinator is {reply.state}: {reply.detail}"
            await asyncio.sleep(POLL_S)
        return reply.max_model_len

    async def replicas(self) -> Sequence[Process]:
        """See Cluster."""
        return [
            Process(
                one.info.replica_id,
                one.child.pid,
                "ready" if alive(one.child.pid) else "dead",
                tuple(one.info.expert_ids),
                one.info.address,
                self._bytes(one.info.replica_id),
            )
            for one in self._members
        ]

    async def coordinators(self) -> Sequence[Process]:
        """See Cluster."""
        return [Process("coordinator-0", self._coordinator.pid, "ready", (), self._client.address)]

    async def info(self) -> dict[str, Any]:
        """What the coordinator counts of its calls, and whom it trusts; None for what it does not tell."""
        reply = await self._client.snapshot()
        counts = {name: getattr(reply, name, None) for name in COUNTS}
        health = [{"replica_id": one.replica_id, "state": one.state} for one in getattr(reply, "replica_health", ())]
        return {**counts, "replica_health": health}

    async def counters(self) -> Counters:
        """See Cluster."""
        return sum_counters([await self.info()])

    async def wait_whole(self, timeout_s: float = WHOLE_TIMEOUT_S) -> None:
        """See Cluster."""
        deadline_s = time.monotonic() + timeout_s
        while (lacking := await self._lacking()) is not None:
            if time.monotonic() > deadline_s:
                raise NotWhole(f"not whole within {timeout_s:g} s: {lacking}")
            await asyncio.sleep(POLL_S)

    async def _lacking(self) -> str | None:
        dead = [one.name for one in (*await self.replicas(), *await self.coordinators()) if not alive(one.pid)]
        return f"{dead[0]} is dead" if dead else unhealthy(await self.info())

    def _bytes(self, replica_id: str) -> int:
        return self.proxies[replica_id].counts["bytes"] if replica_id in self.proxies else 0

    def _in_map(self, info: ReplicaInfo) -> ReplicaInfo:
        proxy = self.proxies.get(info.replica_id)
        return info if proxy is None else replace(info, address=proxy.address)


async def _expert(stack: AsyncExitStack, model: Path, needs: Plain, group: int, copy: int) -> _Member:
    shape = read_config(model)
    size = shape.num_experts // needs.groups
    experts = list(range(group * size, (group + 1) * size))
    child, facts = await expert_process.spawn(
        replica_id=f"experts-{experts[0]}-{experts[-1]}-r{copy}",
        expert_ids=experts,
        first_layer=0,
        num_layers=shape.num_layers,
        model=str(model),
        kernel="auto",
        device="cpu",
        auth_token=TOKEN,
    )
    stack.push_async_callback(expert_process.end, child)
    assert facts["state"] == "ready", facts
    info = ReplicaInfo(
        replica_id=ReplicaId(facts["replica_id"]),
        expert_ids=tuple(ExpertId(expert) for expert in experts),
        first_layer=LayerId(0),
        num_layers=shape.num_layers,
        address=facts["address"],
        node_id=NodeId(f"node-{copy}"),
        numerics_domain=facts["numerics_domain"],
    )
    return _Member(info, child)
