"""A cluster to look at without one: what coordinators and a supervisor would say, changed by a test as it likes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from actors.front.coordinator_pool import CoordinatorPool
from actors.front.front_door import FrontDoor
from actors.front.metrics import FrontMetrics
from actors.front.scrape import StatusWatch
from actors.supervision.status import (
    BalanceStatus,
    ClusterStatus,
    CoordinatorStatus,
    CopiesStatus,
    LoadStatus,
    ReplicaStatus,
)
from protos.coordinator_pb2 import LayerLoad, ReplicaHealth, ReplicaTimes, SnapshotReply
from tests.support.front import MODEL, make_front
from tests.support.scripted_coordinator import ScriptedCoordinator, saying

NODES = ("4f2a9c10aa", "77b01e55bb", "c3d4411fcc")
AT_S = 1_800_000_000.0


def load_of(num_layers: int, num_experts: int, tokens: int = 4000, seed: int = 1) -> list[list[int]]:
    """Tokens by layer and expert, uneven in every layer."""
    random = np.random.default_rng(seed)
    popularity_LE = random.dirichlet(np.full(num_experts, 1.5), size=num_layers)
    return [[int(share * tokens) for share in row] for row in popularity_LE.tolist()]


class SeenCluster:
    """One coordinator and `num_replicas` of every expert; `front()` looks at it. Change its fields, then look again."""

    def __init__(self, num_layers: int = 4, num_experts: int = 8, num_replicas: int = 1) -> None:
        self.shape = (num_layers, num_experts)
        self.copies = num_replicas
        self.load = load_of(num_layers, num_experts)
        self.states: dict[str, tuple[str, str]] = {}
        self.standings: dict[str, tuple[str, str]] = {}
        self.more: dict[str, Any] = {}
        self.fields: dict[str, Any] = {"num_running": 3, "kv_blocks_total": 728, "kv_blocks_free": 700}
        self.generated = 1000
        self.looks = 0
        self.coordinator = ScriptedCoordinator(saying([5, 6, 7]), address="127.0.0.1:40387")
        self.coordinator.reply = self.reply()

    @property
    def names(self) -> list[str]:
        """Ids of all replicas."""
        return [f"expert-{expert}-r{copy}" for expert in range(self.shape[1]) for copy in range(self.copies)]

    def front(self, model_dir: Path, **changes: Any) -> FrontDoor:
        """A front door whose supervisor and coordinator say what this cluster is like at that moment."""
        pool = CoordinatorPool([self.coordinator])
        watch = StatusWatch(self.look)
        metrics = FrontMetrics(MODEL, lambda: pool.last_snapshots, lambda: pool.resubmissions, lambda: watch.last)
        return make_front(model_dir, coordinators=pool, status=watch, metrics=metrics, **changes)

    async def look(self) -> ClusterStatus | None:
        """The supervisor's answer."""
        self.looks += 1
        self.coordinator.reply = self.reply()
        return self.status()

    def reply(self) -> SnapshotReply:
        """The coordinator's account of itself."""
        health = [
            ReplicaHealth(
                replica_id=name,
                state=self.standings.get(name, ("healthy", ""))[0],
                detail=self.standings.get(name, ("healthy", ""))[1],
            )
            for name in self.names
        ]
        times = [
            ReplicaTimes(replica_id=name, busy_share=0.1 + 0.8 * place / len(self.names))
            for place, name in enumerate(self.names)
        ]
        facts: dict[str, Any] = {
            "coordinator_id": "coordinator-0",
            "pid": 4711,
            "node_id": NODES[0],
            "address": "127.0.0.1:40387",
            "state": "ready",
            "map_epoch": 3,
            "kv_block_size": 32,
            "kernel": "fp16",
            "max_model_len": 8192,
            "prompt_tokens_total": 3 * self.generated,
            "generated_tokens_total": self.generated,
            "window_s": 60.0,
            "preemptions_total": 2,
            "window_load": [LayerLoad(tokens=row) for row in self.load],
        }
        return SnapshotReply(replica_health=health, replica_times=times, **(facts | self.fields))

    def status(self) -> ClusterStatus:
        """The supervisor's account."""
        rows = [self._row(place, name) for place, name in enumerate(self.names)]
        dead = {one.replica_id for one in rows if one.state != "ready"}
        copies = [
            CopiesStatus(
                expert_id=expert,
                ready=sum(f"expert-{expert}-r{copy}" not in dead for copy in range(self.copies)),
                wanted=self.copies,
            )
            for expert in range(self.shape[1])
        ]
        parts: Mapping[str, Any] = {
            "state": "degraded" if dead else "ready",
            "model": "mixtral-tiny",
            "model_path": "/models/mixtral-tiny",
            "map_epoch": 3,
            "system_fingerprint": "fp_0123456789abcdef",
            "uptime_s": 5025.0,
            "coordinators": [CoordinatorStatus(coordinator_id="coordinator-0", state="ready", pid=4711, node=NODES[0])],
            "replicas": rows,
            "load": LoadStatus(
                tokens_per_expert=[], window_tokens_per_expert=[], balancedness_per_layer=[], balancedness=1.0
            ),
            "events": [],
            "copies": copies,
            "balance": BalanceStatus(),
        }
        return ClusterStatus(**{**parts, **self.more})

    def _row(self, place: int, name: str) -> ReplicaStatus:
        state, detail = self.states.get(name, ("ready", ""))
        return ReplicaStatus(
            replica_id=name,
            expert_ids=[place // self.copies],
            layers=[0, self.shape[0] - 1],
            pid=16_000 + place,
            node=NODES[place % len(NODES)],
            address=f"10.0.0.{place % 250}:36509",
            state=state,
            detail=detail,
            inflight_tokens=place % 5,
            tokens_total=1_234_567 + 31_000 * place,
            kernel="fp16",
            weight_bytes=159_383_552,
            loaded_bytes=159_383_552,
        )
