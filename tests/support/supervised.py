"""A supervised cluster on three nodes in one event loop, without Ray: real experts and coordinators over real gRPC.

`Asking` is a client that never stops asking, so that whatever is done to the cluster is done while it serves.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.channels import WireCredentials
from actors.front.coordinator_client import CoordinatorClient
from actors.supervision.host_control import HostControl
from actors.supervision.in_process import ONE_NODE, InProcessRuntime
from actors.supervision.status import ClusterStatus, ReplicaStatus
from actors.supervision.supervisor import Supervisor
from cluster.config import ClusterConfig
from protos.coordinator_pb2 import FINISH_REASON_LENGTH
from tests.support.served import submit

TOKEN = "a-token-of-the-tests"
NODES = tuple(replace(ONE_NODE, node_id=f"node-{n}", address=f"127.0.0.{n + 1}", num_cpus=1.0) for n in range(3))
"""Their experts wait for each other, as by what they say of their CPUs."""
PROMPTS = ([1, 30, 40], [1, 7], [1, 99, 250, 3, 4])
Holds = Callable[[ClusterStatus], bool]


def config_of(model: Path, **changes: Any) -> ClusterConfig:
    """One coordinator, everything on the CPU; a balancing interval that a test can wait for."""
    parts: dict[str, Any] = {"model": str(model), "auth_token": TOKEN, "kv_cache_bytes": 1 << 20, "namespace": "space"}
    quick = {"coordinator_threads": 1, "balance_interval_s": 0.1, "drain_timeout_s": 5.0}
    return ClusterConfig(**{**parts, **quick, "device": "cpu", "experts_device": "cpu", **changes})


@asynccontextmanager
async def supervised(
    config: ClusterConfig, runtime: InProcessRuntime | None = None, hosts: HostControl | None = None
) -> AsyncIterator[Supervisor]:
    """A supervisor and all that it starts; both are gone at the end."""
    on = runtime or InProcessRuntime(NODES)
    one = Supervisor(config=config, runtime=on, hosts=hosts)
    try:
        yield one
    finally:
        await one.retire()
        await asyncio.gather(*(actor.ended() for actor in on.spawned))


async def until(one: Supervisor, holds: Holds, timeout_s: float = 200.0) -> ClusterStatus:
    """The first status for which `holds` is true."""
    status = None
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                status = ClusterStatus.from_dict(await one.status())
                if holds(status):
                    return status
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s:g} s: {status}") from None


def ready(status: ClusterStatus) -> bool:
    """Everything needed is there."""
    return status.state == "ready"


def exactly(*names: str) -> Holds:
    """These replicas are ready, nobody else is left, and the coordinators know it."""

    def holds(status: ClusterStatus) -> bool:
        there = sorted(one.replica_id for one in status.replicas if one.state == "ready")
        known = all(one.map_epoch == status.map_epoch and one.state == "ready" for one in status.coordinators)
        return there == sorted(names) and len(status.replicas) == len(names) and known

    return holds


def by_id(status: ClusterStatus) -> dict[str, ReplicaStatus]:
    """Replicas by their ids."""
    return {one.replica_id: one for one in status.replicas}


class Asking:
    """Asks the coordinator at `address` the same questions over and over; every answer must be what the first was."""

    def __init__(self, address: str) -> None:
        self.num_answers = 0
        self._first: dict[int, list[int]] = {}
        self._client = CoordinatorClient(address, WireCredentials(TOKEN))
        self._client.open()
        self._task = asyncio.create_task(self._ask())

    async def more(self, num: int = 3) -> None:
        """Returns when so many more answers have come, all of them right."""
        target = self.num_answers + num
        while self.num_answers < target:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Ends it. Raises what went wrong while it asked."""
        self._task.cancel()
        (result,) = await asyncio.gather(self._task, return_exceptions=True)
        await self._client.close()
        if isinstance(result, Exception):
            raise result

    async def _ask(self) -> None:
        await self._client.connect()
        while True:
            which = self.num_answers % len(PROMPTS)
            tokens: list[int] = []
            asked = submit(self.num_answers + 1, PROMPTS[which], max_tokens=12)
            async for output in self._client.generate(asked):
                tokens += output.token_ids
            assert output.finish_reason == FINISH_REASON_LENGTH, output
            assert tokens == self._first.setdefault(which, tokens), f"prompt {which}: {tokens}"
            self.num_answers += 1


@asynccontextmanager
async def asking(status: ClusterStatus) -> AsyncIterator[Asking]:
    """A client that asks until the block ends."""
    one = Asking(status.coordinators[0].address)
    try:
        await one.more()
        yield one
        await one.more()
    finally:
        await one.close()
