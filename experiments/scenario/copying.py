"""What a copy costs on a machine: how long it takes to come, and how slow steps are meanwhile.

Copies are made by hand while the scenario's own load runs, and drained again, so nothing is left of them. What is
compared is the time of a token with a copy under way and without.
"""

import asyncio
from dataclasses import dataclass

from experiments.scenario.calibration import Measured, together
from experiments.scenario.hand_made import CALM_S, MOST_S, Stretches, begin, end, lasting
from experiments.scenario.live_run import LiveCluster, LiveRun
from experiments.scenario.schema import Scenario

NUM_COPIES = 3


@dataclass(frozen=True, slots=True)
class CopyCost:
    """Copies served after `took_s`, each; until then a step takes `slows` times as long, at least once."""

    took_s: tuple[float, ...]
    slows: float

    @property
    def seconds(self) -> float:
        """On average."""
        return sum(self.took_s) / len(self.took_s)


async def copy_cost(cluster: LiveCluster, scenario: Scenario, *, calm_s: float = CALM_S) -> CopyCost:
    """Measured under a load like the scenario's last phase. Raises MoveRefused where there is no room for a copy,
    TimeoutError where one does not come, ValueError where nothing was served meanwhile.
    """
    took_s: list[float] = []
    calm: list[Measured] = []
    copying: list[Measured] = []
    async with asyncio.timeout(MOST_S), LiveRun(cluster).sending(lasting(scenario)):
        stretches = Stretches(cluster)
        await asyncio.sleep(calm_s)
        await stretches.begin()
        for expert in range(NUM_COPIES):
            await asyncio.sleep(calm_s)
            calm.append((await stretches.end())[1])
            replica_id = await begin(cluster, expert)
            seconds, of_copy = await stretches.end()
            took_s.append(seconds)
            copying.append(of_copy)
            await end(cluster, replica_id)
            await stretches.begin()
        await asyncio.sleep(calm_s)
        calm.append((await stretches.end())[1])
    slows = together(copying).token_s / together(calm).token_s
    return CopyCost(tuple(took_s), slows=max(slows, 1.0))
