"""On three Ray nodes: a hot expert gets a copy on another node and loses it again; replicas are changed by hand.

Experts are slow by decree (`tests.support.throttled`), so that load is load on a machine with two cores. How much is
won is measured elsewhere (row B1 of `tests.chaos`); here it is what happens, and that nobody notices.
"""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.supervision.status import ClusterStatus
from cluster.config import ClusterConfig
from tests.support.hot_cluster import TOKEN, HotCluster, hot_cluster
from tests.support.hot_load import HotLoad
from tests.support.hot_model import EXPERTS, HOT_EVEN, write_hot_model
from tests.support.served_cluster import environment, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

EACH = {f"expert-{e}-r0" for e in range(EXPERTS)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HotCluster]:
    model = write_hot_model(tmp_path_factory.mktemp("model") / "hot")
    config = ClusterConfig(
        model=str(model),
        auth_token=TOKEN,
        device="cpu",
        experts_device="cpu",
        coordinator_threads=1,
        kv_cache_bytes=1 << 22,
        microbatches=2,
        expert_slots=4,
        balance_interval_s=1.0,
        drain_timeout_s=10.0,
    )
    with hot_cluster(config) as found:
        found.until(lambda status: status.state == "ready", 240)
        yield found


def ids(status: ClusterStatus) -> set[str]:
    return {one.replica_id for one in status.replicas}


def nodes_of(status: ClusterStatus, expert: int) -> list[str]:
    """Where the expert is ready to serve."""
    return [one.node for one in status.replicas if one.expert_ids == [expert] and one.state == "ready"]


async def on(cluster: HotCluster, holds: object, timeout_s: float) -> ClusterStatus:
    return await asyncio.to_thread(cluster.until, holds, timeout_s)  # type: ignore[arg-type]


def test_a_hot_expert_is_copied_to_another_node_and_drained_when_the_load_is_gone(cluster: HotCluster) -> None:
    async def work() -> None:
        status = cluster.supervisor.status()
        load = HotLoad(status.coordinators[0].address, TOKEN, width=16)
        try:
            await load.more(48)
            share = status_share(cluster.supervisor.status())
            assert share >= 0.4, f"the hot expert has {share:.0%} of the rows"
            cluster.supervisor.switch_balance("on")
            hot = await on(cluster, lambda now: len(set(nodes_of(now, HOT_EVEN))) >= 2, 300)
            assert len(nodes_of(hot, HOT_EVEN)) == len(set(nodes_of(hot, HOT_EVEN))), "one copy on a node"
            assert any(
                move["what"] == f"expert {HOT_EVEN}" and move["reason"]
                for move in hot.balance.proposed + hot.balance.done
            )
            await load.more(32)
            load.family = None
            quiet = await on(cluster, lambda now: len(now.replicas) == EXPERTS, 300)
            assert all(len(nodes_of(quiet, expert)) == 1 for expert in range(EXPERTS))
            assert quiet.balance.failed == []
            assert quiet.balance.moves_total >= 2
            cluster.supervisor.switch_balance("off")
            load.family = 0
            await load.more(16)
        finally:
            await load.close()
        assert (load.failed, load.wrong) == ([], [])

    asyncio.run(work())


def status_share(status: ClusterStatus) -> float:
    """Of all routed rows, those that the busiest expert got."""
    tokens = status.load.window_tokens_per_expert
    return max(tokens) / sum(tokens)


def test_by_hand_while_it_serves(cluster: HotCluster, tmp_path: Path) -> None:
    env = environment(tmp_path)
    at = ("--address", cluster.address)

    def octavo(*arguments: str) -> tuple[int, str]:
        done = run([*arguments, *at], env)
        return done.returncode, done.stdout + done.stderr

    async def work() -> None:
        load = HotLoad(cluster.supervisor.status().coordinators[0].address, TOKEN, width=4)
        try:
            await load.more(4)
            code, text = await asyncio.to_thread(octavo, "experts", "replicate", "3", "--layers", "0-0")
            assert code == 0, text
            assert "expert-3-l0-0-r0 is made on node" in text
            code, text = await asyncio.to_thread(octavo, "experts", "list")
            assert code == 0
            assert "expert-3-l0-0-r0" in text
            code, text = await asyncio.to_thread(octavo, "experts", "drain", "expert-3-l0-0-r0")
            assert code == 0, text
            code, text = await asyncio.to_thread(octavo, "experts", "replicate", "42")
            assert (code, text.strip()) == (1, "octavo: there is no expert 42: the model has 0 to 7")
            code, text = await asyncio.to_thread(octavo, "balance", "--dry-run", "--json")
            assert code == 0, text
            assert json.loads(text)["busiest_share_before"] > 0
            for processes in (4, 8):
                await asyncio.to_thread(cluster.supervisor.fold, processes)
                status = await on(cluster, lambda now, num=processes: whole(now, num), 300)
                assert {len(one.expert_ids) for one in status.replicas} == {EXPERTS // processes}
                await load.more(4)
        finally:
            await load.close()
        assert (load.failed, load.wrong) == ([], [])

    asyncio.run(work())


def whole(status: ClusterStatus, processes: int) -> bool:
    states = [one.state for one in status.replicas]
    return states == ["ready"] * processes and status.state == "ready"
