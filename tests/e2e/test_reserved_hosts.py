"""A node on which somebody is at work is not idle, although nobody holds a CPU or a GPU there: Ray's autoscaler lets
it be, also when nobody asks for it any more; when the last process ends, it goes.
"""

import time
from collections.abc import Callable, Iterator

import pytest

from actors import ray_runtime
from cluster.placement import COORDINATOR_HOST, EXPERT_HOST
from tests.support.autoscaling_ray import AutoscalingRay

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

IDLE_TIMEOUT_S = 2.0


class AtWork:
    """Holds nothing but what it was given."""

    async def node_id(self) -> str:
        return ray_runtime.own_node_id()


@pytest.fixture
def ray() -> Iterator[AutoscalingRay]:
    ray_runtime.disconnect()
    one = AutoscalingRay(
        {"CPU": 1, EXPERT_HOST: 1}, head={COORDINATOR_HOST: 1}, max_workers=2, idle_timeout_s=IDLE_TIMEOUT_S
    )
    try:
        ray_runtime.connect(one.address, "reserved")
        yield one
    finally:
        ray_runtime.disconnect()
        one.close()


def hosts() -> set[str]:
    return {node.node_id for node in ray_runtime.nodes() if EXPERT_HOST in node.roles}


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 200
    while not holds():
        assert time.monotonic() < deadline_s, hosts()
        time.sleep(0.2)


def test_a_node_with_a_process_stays_and_one_without_goes(ray: AutoscalingRay) -> None:
    ray_runtime.request_nodes(2, EXPERT_HOST)
    until(lambda: len(hosts()) == 2)
    busy, idle = sorted(hosts())
    actor = ray_runtime.spawn(
        AtWork, name="at-work", namespace="reserved", kwargs={}, env={}, node_id=busy, role=EXPERT_HOST
    )
    assert actor.call_sync("node_id", timeout_s=200) == busy
    ray_runtime.request_nodes(0, EXPERT_HOST)
    until(lambda: hosts() == {busy})
    time.sleep(3 * IDLE_TIMEOUT_S)  # that nothing happens has no event to wait for
    assert hosts() == {busy}, "it had been idle for long, did its process hold nothing"
    actor.kill()
    until(lambda: not hosts())
    assert idle not in hosts()
