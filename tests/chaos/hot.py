"""A throttled cluster on three Ray nodes for rows about balancing: experts are slow by decree, one of them is hot."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from actors.supervision.status import ClusterStatus
from cluster.config import ClusterConfig
from tests.chaos.clusters import MODEL_ID, WHOLE_TIMEOUT_S, Counters, Process
from tests.support.hot_cluster import TOKEN, HotCluster, hot_cluster
from tests.support.hot_model import write_hot_model


@dataclass(frozen=True)
class OnHotNodes:
    """Needs `tests.support.hot_cluster` with balancing off; the suite's own model is not used.

    A row takes an expert so long that steps wait for experts most of the time: with 1 ms it was half of it.
    """

    expert_slots: int = 4
    interval_s: float = 4.0
    microbatches: int = 4
    row_us: float = 3000.0

    @asynccontextmanager
    async def open(self, model: Path, home: Path) -> AsyncIterator["HotChaos"]:
        """In this thread, the main one, as Ray wants it."""
        config = ClusterConfig(
            model=str(write_hot_model(home / "hot")),
            auth_token=TOKEN,
            device="cpu",
            experts_device="cpu",
            coordinator_threads=1,
            kv_cache_bytes=1 << 22,
            microbatches=self.microbatches,
            expert_slots=self.expert_slots,
            balance_interval_s=self.interval_s,
        )
        with ExitStack() as stack:
            one = HotChaos(stack.enter_context(hot_cluster(config, self.row_us)), self.interval_s)
            await one.wait_whole()
            yield one


class HotChaos:
    """See `tests.chaos.clusters.Cluster`; there is no front door here, clients speak to the coordinator."""

    url = ""
    model_id = MODEL_ID

    def __init__(self, hot: HotCluster, interval_s: float) -> None:
        self.hot = hot
        self.interval_s = interval_s

    async def status(self) -> ClusterStatus:
        """What `octavo status` shows."""
        return await asyncio.to_thread(self.hot.supervisor.status)

    async def replicas(self) -> Sequence[Process]:
        """See Cluster."""
        return [
            Process(one.replica_id, one.pid, one.state, tuple(one.expert_ids), one.address, one.tokens_total)
            for one in (await self.status()).replicas
        ]

    async def coordinators(self) -> Sequence[Process]:
        """See Cluster."""
        return [
            Process(one.coordinator_id, one.pid, one.state, (), one.address)
            for one in (await self.status()).coordinators
        ]

    async def counters(self) -> Counters:
        """They are not asked here."""
        return Counters(None, None)

    async def wait_whole(self, timeout_s: float = WHOLE_TIMEOUT_S) -> None:
        """See Cluster."""
        await asyncio.to_thread(self.hot.until, lambda status: status.state == "ready", timeout_s)
