"""Load alone: under Ray's autoscaler it makes a node appear, the hot expert is copied there, and it goes with the load.

Real are Ray, its autoscaler v2, the nodes, the supervisor with `balance` on and its own policy, the coordinator, and
the requests. Only experts are slow by decree (`tests.support.throttled`), and hosts are told to be at most half busy.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors import ray_runtime
from actors.supervision.status import ClusterStatus
from cluster.config import ClusterConfig
from cluster.placement import COORDINATOR_HOST, EXPERT_HOST
from tests.support.autoscaling_ray import AutoscalingRay
from tests.support.hot_cluster import TOKEN, HotCluster, let_workers_find_us, throttled
from tests.support.hot_load import HotLoad
from tests.support.hot_model import EXPERTS, HOT_EVEN, write_hot_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

IDLE_TIMEOUT_S = 3.0


@pytest.fixture
def ray() -> Iterator[AutoscalingRay]:
    ray_runtime.disconnect()
    let_workers_find_us()
    one = AutoscalingRay(
        {"CPU": 1, EXPERT_HOST: 1}, head={COORDINATOR_HOST: 1}, max_workers=3, idle_timeout_s=IDLE_TIMEOUT_S
    )
    try:
        yield one
    finally:
        ray_runtime.disconnect()
        one.close()


@pytest.fixture
def cluster(ray: AutoscalingRay, tmp_path: Path) -> Iterator[HotCluster]:
    config = ClusterConfig(
        model=str(write_hot_model(tmp_path / "hot")),
        auth_token=TOKEN,
        device="cpu",
        experts_device="cpu",
        coordinator_threads=1,
        kv_cache_bytes=1 << 22,
        microbatches=1,
        experts_per_actor=4,
        expert_slots=4,
        balance="on",
        balance_interval_s=1.0,
        drain_timeout_s=5.0,
        min_expert_hosts=2,
        max_expert_hosts=3,
        target_busy_share=0.5,
        scale_up_s=2.0,
        scale_down_s=10.0,
    )
    with throttled(ray.address, config) as found:
        yield found


def hosts() -> set[str]:
    return {node.node_id for node in ray_runtime.nodes() if EXPERT_HOST in node.roles}


def holders(status: ClusterStatus, expert: int) -> set[str]:
    """Nodes on which the expert is ready to serve."""
    return {one.node for one in status.replicas if expert in one.expert_ids and one.state == "ready"}


def test_a_host_comes_with_the_load_and_goes_with_it(cluster: HotCluster) -> None:
    async def on(holds: object, timeout_s: float) -> ClusterStatus:
        return await asyncio.to_thread(cluster.until, holds, timeout_s)  # type: ignore[arg-type]

    async def work() -> None:
        first = await on(lambda status: status.state == "ready", 300)
        before = hosts()
        assert len(before) == 2, "the least"
        load = HotLoad(first.coordinators[0].address, TOKEN, width=32)
        try:
            hot = await on(lambda status: len(holders(status, HOT_EVEN)) == 2 and len(hosts()) == 3, 400)
            (new,) = hosts() - before
            assert new in holders(hot, HOT_EVEN), "the hot expert's copy is on the host that came"
            await load.more(32)
            load.family = None
            quiet = await on(lambda _: len(hosts()) == 2, 400)
            quiet = await on(lambda status: status.state == "ready", 240)
            assert all(holders(quiet, expert) for expert in range(EXPERTS))
            load.family = 0
            await load.more(8)
        finally:
            await load.close()
        assert (load.failed, load.wrong) == ([], [])

    asyncio.run(work())
