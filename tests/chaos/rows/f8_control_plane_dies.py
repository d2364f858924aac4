"""F8s: who only looks after the cluster dies: the supervisor, Serve's controller. Nobody's tokens need them."""

import asyncio
import time

from tests.chaos import faults
from tests.chaos.clusters import ServedChaos
from tests.chaos.context import Context, Live
from tests.chaos.figures import Bar
from tests.chaos.nodes import OnNodes
from tests.chaos.row import row

SUPERVISOR = "ray::Supervisor"
CONTROLLER = "ray::ServeController"
BACK_TIMEOUT_S = 60.0
POLL_S = 0.2


@row(
    "F8S",
    fault="SIGKILL the supervisor, then Serve's controller",
    promise="requests go on; what runs is found again and not restarted",
    bar=Bar(text="back <= 30 s", recover_s=30.0),
    needs=OnNodes(),
)
async def the_control_plane_dies(ctx: Context) -> None:
    """One trial each; the process is back at the end, another one, and everybody else is the same."""
    cluster = ctx.cluster
    assert isinstance(cluster, ServedChaos)
    for _ in ctx.trials():
        for title in (SUPERVISOR, CONTROLLER):
            before = await cluster.status()
            await ctx.trial(lambda live, title=title: kill(live, title))  # type: ignore[misc]
            after = await cluster.status()
            same = [one.pid for one in before.replicas] == [one.pid for one in after.replicas]
            ctx.require(same, f"replicas were restarted after {title} died")
            same = [one.pid for one in before.coordinators] == [one.pid for one in after.coordinators]
            ctx.require(same, f"a coordinator was restarted after {title} died")
            ctx.require(after.map_epoch >= before.map_epoch, "the map's epoch went back")


async def kill(live: Live, title: str) -> None:
    """Kills the process of that title and waits until there is another."""
    cluster = live.cluster
    assert isinstance(cluster, ServedChaos)
    (victim,) = await asyncio.to_thread(cluster.processes, title)
    live.begins()
    faults.kill(victim.pid)
    await asyncio.to_thread(wait_for_another, cluster, title, victim.pid)


def wait_for_another(cluster: ServedChaos, title: str, pid: int) -> None:
    """Returns when another process has the title. Raises TimeoutError."""
    deadline_s = time.monotonic() + BACK_TIMEOUT_S
    while all(one.pid == pid for one in cluster.processes(title)):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no {title} within {BACK_TIMEOUT_S:g} s")
        time.sleep(POLL_S)
