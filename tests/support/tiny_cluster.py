"""A whole cluster in this process: real expert actors and a real coordinator over real gRPC, without Ray."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.channels import WireCredentials, open_channel
from actors.coordinator.actor import Coordinator
from actors.expert.actor import ExpertActor
from actors.front.coordinator_client import CoordinatorClient
from actors.front.front_door import FrontDoor, load_front
from actors.map_wire import map_to_wire
from actors.tracing.opening import open_tracer
from cluster.config import ClusterConfig
from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from model.storage.config_reader import read_config
from protos.coordinator_pb2 import SnapshotReply
from protos.coordinator_pb2_grpc import CoordinatorServiceStub

TOKEN = "a-token-for-tests-only"


@dataclass
class TinyCluster:
    """A running cluster. `front` is a front door onto it that is not served yet."""

    model_dir: Path
    address: str
    coordinator: Coordinator
    front: FrontDoor

    client: CoordinatorClient

    async def snapshot(self) -> SnapshotReply:
        """The coordinator's counters, over the wire."""
        return await self.client.snapshot()

    async def until(self, holds: Callable[[SnapshotReply], bool]) -> SnapshotReply:
        """The first snapshot for which `holds` is true."""
        return await _until(self.client, holds)


@asynccontextmanager
async def tiny_cluster(model_dir: Path, *, expert_device: str = "cpu", **config: Any) -> AsyncIterator[TinyCluster]:
    """A cluster for the checkpoint in `model_dir`: one expert actor per expert, one coordinator, all ready."""
    chosen = ClusterConfig(
        **{"model": str(model_dir), "coordinator_threads": 1, "kv_cache_bytes": 1 << 24, "device": "cpu", **config}
    )
    async with AsyncExitStack() as stack:
        expert_map = await _start_experts(stack, model_dir, expert_device)
        coordinator = Coordinator(coordinator_id="coordinator-0", config=chosen, auth_token=TOKEN)
        stack.push_async_callback(coordinator.stop)
        address = await coordinator.start()
        client = CoordinatorClient(address, WireCredentials(TOKEN))
        stack.push_async_callback(client.close)
        await _publish(address, expert_map)
        ready = await _ready(client)
        front = load_front(
            model_dir,
            [client],
            model_id="tiny",
            max_model_len=ready.max_model_len,
            system_fingerprint=f"fp_{ready.weights_id[:10]}",
            request_timeout_s=600.0,
            routed_experts=chosen.enable_return_routed_experts,
            spans=open_tracer(chosen, "ingress", "ingress-0"),
        )
        yield TinyCluster(model_dir, address, coordinator, front, client)


async def _start_experts(stack: AsyncExitStack, model_dir: Path, device: str) -> ExpertMap:
    shape = read_config(model_dir)
    replicas = []
    for expert in range(shape.num_experts):
        actor = ExpertActor(
            replica_id=f"expert-{expert}-r0",
            expert_ids=[expert],
            first_layer=0,
            num_layers=shape.num_layers,
            model=str(model_dir),
            kernel="auto",
            device=device,
            auth_token=TOKEN,
        )
        stack.push_async_callback(actor.stop)
        await actor.start()
        info = await actor.wait_settled()
        assert info["state"] == "ready", info
        replicas.append(
            ReplicaInfo(
                replica_id=ReplicaId(info["replica_id"]),
                expert_ids=(ExpertId(expert),),
                first_layer=LayerId(0),
                num_layers=shape.num_layers,
                address=info["address"],
                node_id=NodeId("here"),
                numerics_domain=info["numerics_domain"],
            )
        )
    return ExpertMap(1, shape.num_layers, shape.num_experts, tuple(replicas))


async def _publish(address: str, expert_map: ExpertMap) -> None:
    async with open_channel(address, WireCredentials(TOKEN)) as channel:
        await CoordinatorServiceStub(channel).PublishMap(map_to_wire(expert_map), timeout=120)  # type: ignore[no-untyped-call]


async def _ready(client: CoordinatorClient) -> SnapshotReply:
    reply = await _until(client, lambda now: now.state != "loading")
    assert reply.state == "ready", reply.detail
    return reply


async def _until(client: CoordinatorClient, holds: Callable[[SnapshotReply], bool]) -> SnapshotReply:
    """A coordinator tells nobody when something changes: it is asked again and again."""
    reply = await client.snapshot()
    try:
        async with asyncio.timeout(120):
            while not holds(reply):
                await asyncio.sleep(0.01)
                reply = await client.snapshot()
    except TimeoutError:
        raise AssertionError(f"still not: {reply}") from None
    return reply
