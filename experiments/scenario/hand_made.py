"""Copies of experts made by hand while a scenario's own load runs, and what coordinators counted in stretches of it."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from actors.supervision.status import ClusterStatus
from experiments.scenario.calibration import Measured, measured
from experiments.scenario.live_run import LiveCluster
from experiments.scenario.load import PhaseLoad, phase_loads
from experiments.scenario.schema import Phase, Scenario
from protos.coordinator_pb2 import SnapshotReply

CALM_S = 8.0
"""A stretch."""
MOST_S = 600.0
"""For all that is measured of one kind of copies."""
POLL_S = 0.2


def lasting(scenario: Scenario) -> PhaseLoad:
    """The last phase's requests for as long as measuring may take, always of clients that wait for their answers.

    Otherwise slower steps would have more tokens each, which does not make a token slower.
    """
    (load,) = phase_loads(replace(scenario, phases=(last_phase(scenario, MOST_S),)), 0)
    return load


def last_phase(scenario: Scenario, duration_s: float) -> Phase:
    """The last phase, so long, of clients that wait for their answers."""
    last = scenario.phases[-1]
    num_clients = last.concurrency or max(scenario.max_num_seqs // 2, 1)
    return replace(last, duration_s=duration_s, concurrency=num_clients, rate=None, rate_to=None)


async def begin(cluster: LiveCluster, expert: int) -> str:
    """One more replica of the expert; returns its id once it serves. Raises MoveRefused, TimeoutError."""
    replica_id = await cluster.copy(expert)
    await _until(cluster, lambda status: _serves(status, replica_id))
    return replica_id


async def end(cluster: LiveCluster, replica_id: str) -> None:
    """Returns once that replica is gone. Raises MoveRefused, TimeoutError."""
    await cluster.drain(replica_id)
    await _until(cluster, lambda status: _state(status, replica_id) is None)


@dataclass(slots=True)
class Stretches:
    """Stretches of a run, each from where the one before ended."""

    cluster: LiveCluster
    at_s: float = 0.0
    before: SnapshotReply = field(default_factory=SnapshotReply)

    async def begin(self) -> None:
        """The next stretch is from now on; what passed since the last one is nobody's."""
        self.before, self.at_s = await self.cluster.client.snapshot(), time.monotonic()

    async def end(self) -> tuple[float, Measured]:
        """Seconds of the stretch, and all that happened in it. Raises ValueError where no step was made."""
        before, began_s = self.before, self.at_s
        await self.begin()
        return self.at_s - began_s, measured(before, self.before, self.at_s - began_s)


def _serves(status: ClusterStatus, replica_id: str) -> bool:
    """It is ready, and every coordinator was told: until then whoever balances makes no other copy."""
    told = all(one.map_epoch >= status.map_epoch for one in status.coordinators)
    return told and _state(status, replica_id) == "ready"


def _state(status: ClusterStatus, replica_id: str) -> str | None:
    return next((one.state for one in status.replicas if one.replica_id == replica_id), None)


async def _until(cluster: LiveCluster, holds: Callable[[ClusterStatus], bool]) -> None:
    async with asyncio.timeout(MOST_S):
        while not holds(await cluster.status()):  # noqa: ASYNC110 - the supervisor is another process
            await asyncio.sleep(POLL_S)
