"""What a copy costs on a machine: how long it takes to come, and how slow steps are meanwhile.

Copies are made by hand while the scenario's own load runs, and drained again, so nothing is left of them. What is
compared is the time of a token with a copy under way and without.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from actors.supervision.status import ClusterStatus
from experiments.scenario.calibration import Measured, measured
from experiments.scenario.live_run import LiveCluster, LiveRun
from experiments.scenario.load import PhaseLoad, phase_loads
from experiments.scenario.schema import Scenario
from protos.coordinator_pb2 import SnapshotReply

CALM_S = 8.0
NUM_COPIES = 3
MOST_S = 600.0
"""For all of it."""
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class CopyCost:
    """A copy serves after `seconds`; until then a step takes `slows` times as long, at least once."""

    seconds: float
    slows: float


@dataclass(slots=True)
class _Totals:
    """Time and tokens of several stretches of a run."""

    seconds: float = 0.0
    tokens: float = 0.0

    def add(self, one: Measured) -> None:
        self.seconds += one.own_s + one.wait_s
        self.tokens += float(one.load_LE[0].sum())

    @property
    def token_s(self) -> float:
        return self.seconds / self.tokens


@dataclass(slots=True)
class _Stretches:
    """Stretches of a run, each from where the one before ended."""

    cluster: LiveCluster
    at_s: float
    before: SnapshotReply
    calm: _Totals = field(default_factory=_Totals)
    copying: _Totals = field(default_factory=_Totals)

    async def end(self, totals: _Totals | None) -> float:
        """The stretch ends and counts there, if anywhere; its seconds."""
        now, at_s = await self.cluster.client.snapshot(), time.monotonic()
        passed_s = at_s - self.at_s
        if totals is not None:
            totals.add(measured(self.before, now, passed_s))
        self.at_s, self.before = at_s, now
        return passed_s


async def copy_cost(cluster: LiveCluster, scenario: Scenario, *, calm_s: float = CALM_S) -> CopyCost:
    """Measured under a load like the scenario's last phase. Raises MoveRefused where there is no room for a copy,
    TimeoutError where one does not come, ValueError where nothing was served meanwhile.
    """
    load = lasting(scenario)
    took_s = []
    async with asyncio.timeout(MOST_S), LiveRun(cluster).sending(load):
        await asyncio.sleep(calm_s)
        stretches = _Stretches(cluster, time.monotonic(), await cluster.client.snapshot())
        for number in range(NUM_COPIES):
            await asyncio.sleep(calm_s)
            await stretches.end(stretches.calm)
            replica_id = await cluster.copy(number)
            await _until(cluster, lambda status, it=replica_id: _serves(status, it))  # type: ignore[misc]
            took_s.append(await stretches.end(stretches.copying))
            await cluster.drain(replica_id)
            await _until(cluster, lambda status, it=replica_id: _state(status, it) is None)  # type: ignore[misc]
            await stretches.end(None)
        await asyncio.sleep(calm_s)
        await stretches.end(stretches.calm)
    return CopyCost(
        seconds=sum(took_s) / len(took_s), slows=max(stretches.copying.token_s / stretches.calm.token_s, 1.0)
    )


def lasting(scenario: Scenario) -> PhaseLoad:
    """The last phase's requests for as long as measuring may take, always of clients that wait for their answers.

    Otherwise slower steps would have more tokens each, which does not make a token slower.
    """
    last = scenario.phases[-1]
    num_clients = last.concurrency or max(scenario.max_num_seqs // 2, 1)
    phase = replace(last, duration_s=MOST_S, concurrency=num_clients, rate=None, rate_to=None)
    (load,) = phase_loads(replace(scenario, phases=(phase,)), 0)
    return load


def _serves(status: ClusterStatus, replica_id: str) -> bool:
    """It is ready, and every coordinator was told: until then whoever balances makes no other copy."""
    told = all(one.map_epoch >= status.map_epoch for one in status.coordinators)
    return told and _state(status, replica_id) == "ready"


def _state(status: ClusterStatus, replica_id: str) -> str | None:
    return next((one.state for one in status.replicas if one.replica_id == replica_id), None)


async def _until(cluster: LiveCluster, holds: Callable[[ClusterStatus], bool]) -> None:
    while not holds(await cluster.status()):  # noqa: ASYNC110 - the supervisor is another process
        await asyncio.sleep(POLL_S)
