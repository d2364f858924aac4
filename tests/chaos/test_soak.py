"""The soak goes on when a victim is gone already, or when nobody can tell who is there; and it says so."""

import asyncio
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

from actors.ray_runtime import RuntimeFailure
from tests.chaos.clusters import Process
from tests.chaos.context import Live
from tests.chaos.player import Player
from tests.chaos.rows.s1_soak import Mix
from tests.chaos.scripted_server import ScriptedCluster


class Forgetful(ScriptedCluster):
    """It names processes that are no more, and every third time nothing at all."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.times = 0

    async def replicas(self) -> Sequence[Process]:
        self.times += 1
        if self.times % 3 == 0:
            raise RuntimeFailure("the supervisor is away")
        return [Process(f"r{copy}", self.pid, "ready", (0, 1)) for copy in range(2)]

    async def coordinators(self) -> Sequence[Process]:
        raise TimeoutError


def test_the_soak_goes_on_without_a_victim() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    done: Counter[str] = Counter()

    async def work() -> None:
        live = Live(Forgetful(gone.pid), random.Random(7), Player.__new__(Player))
        soak = asyncio.create_task(Mix(600.0, done, pause_s=(0.0, 0.01))(live))
        async with asyncio.timeout(120):
            while not (done["(gone already)"] and done["(no word of who is there)"]):
                await asyncio.sleep(0.01)
                assert not soak.done(), soak
        soak.cancel()
        await asyncio.gather(soak, return_exceptions=True)

    asyncio.run(work())
    assert "freeze expert" not in done, "nobody was there to be frozen"


def test_nobody_is_hurt_who_is_the_last() -> None:
    done: Counter[str] = Counter()

    class Last(Forgetful):
        async def replicas(self) -> Sequence[Process]:
            return [Process("r0", 0, "ready", (0, 1)), Process("r1", 0, "starting", (0, 1))]

        async def coordinators(self) -> Sequence[Process]:
            return [Process("c0", 0, "ready")]

    async def work() -> None:
        await Mix(0.1, done, pause_s=(0.0, 0.01))(Live(Last(0), random.Random(7), Player.__new__(Player)))

    asyncio.run(work())
    assert not done
