"""What it costs to spread an expert's rows over more processes: steps with copies of the busiest experts and without.

With copies a step sends more messages, and its answers come at about the same time, while the run that tells the
simulator's constants has one expert that all others wait for. So copies are made by hand, kept for a while and
drained, more than once, since a machine is not the same from minute to minute. What is made of it is `learning`'s.
E experts.
"""

import asyncio
import time
from dataclasses import dataclass

import numpy as np

from actors.supervision.status import ClusterStatus
from cluster.desired_set import MoveRefused
from cluster.layout import FloatArray, IntArray
from experiments.scenario.calibration import Measured, together
from experiments.scenario.hand_made import CALM_S, MOST_S, Stretches, begin, end, lasting
from experiments.scenario.live_run import LiveCluster, LiveRun
from experiments.scenario.schema import Scenario

NUM_COPIES = 3
NUM_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Spread:
    """All steps with the copies and all without, under one load, who was there with them, and how long each took."""

    calm: Measured
    kept: Measured
    status: ClusterStatus
    took_s: tuple[float, ...] = ()


async def spread(cluster: LiveCluster, scenario: Scenario, *, calm_s: float = CALM_S) -> Spread:
    """Measured under a load like the scenario's last phase. Raises MoveRefused where there is no room for a copy,
    TimeoutError where one does not come, ValueError where nothing was served meanwhile.
    """
    calm: list[Measured] = []
    kept: list[Measured] = []
    took_s: list[float] = []
    async with asyncio.timeout(MOST_S), LiveRun(cluster).sending(lasting(scenario)):
        stretches = Stretches(cluster)
        for _ in range(NUM_ROUNDS):
            await asyncio.sleep(calm_s)
            await stretches.begin()
            await asyncio.sleep(calm_s)
            calm.append((await stretches.end())[1])
            made = await _copies(cluster, calm[-1].load_LE.sum(axis=0), took_s)
            await asyncio.sleep(calm_s)
            await stretches.begin()
            await asyncio.sleep(calm_s)
            kept.append((await stretches.end())[1])
            status = await cluster.status()
            for replica_id in made:
                await end(cluster, replica_id)
    return Spread(together(calm), together(kept), status, tuple(took_s))


async def _copies(cluster: LiveCluster, load_E: FloatArray, took_s: list[float]) -> list[str]:
    """Up to NUM_COPIES copies, and as many as there is room for, each of who is busiest then. Adds to `took_s`."""
    status = await cluster.status()
    copies_E = np.bincount([e for one in status.replicas for e in one.expert_ids], minlength=len(load_E))
    most = len({one.node for one in status.replicas})
    made: list[str] = []
    for expert in busiest(load_E, copies_E, NUM_COPIES, most):
        began_s = time.monotonic()
        try:
            made.append(await begin(cluster, expert))
        except MoveRefused:
            if not made:
                raise
            break
        took_s.append(time.monotonic() - began_s)
    return made


def busiest(load_E: FloatArray, copies_E: IntArray, num: int, most: int) -> list[int]:
    """Whom to copy, one after another: the expert whose copies have most to do each, of those with fewer than `most`.

    >>> busiest(np.array([9.0, 4.0, 1.0]), np.array([1, 1, 1]), 3, 3)
    [0, 0, 1]
    """
    chosen: list[int] = []
    copies_E = copies_E.copy()
    for _ in range(num):
        each_E = np.where(copies_E < max(most, 2), load_E / np.maximum(copies_E, 1), 0.0)
        if not each_E.any():
            break
        chosen.append(int(each_E.argmax()))
        copies_E[chosen[-1]] += 1
    return chosen
