"""Our own contestant: a cluster as `octavo serve` starts it, but without HTTP. Several live beside each other.

Each has a namespace of its own in one local Ray, which the caller starts and ends.
"""

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from rich.console import Console

from actors.channels import WireCredentials
from actors.command.progress import watch_start
from actors.front.coordinator_client import CoordinatorClient
from actors.supervision.client import SupervisorClient
from actors.supervision.launch import ensure_supervisor
from actors.supervision.status import ClusterStatus, CoordinatorStatus, ReplicaStatus
from cluster.config import ClusterConfig
from experiments.engine_bench import drive
from experiments.engine_bench.contestants import Prompts, Sample
from experiments.engine_bench.memory import memory_use
from experiments.engine_bench.shares import CpuTimes, cpu_seconds

START_TIMEOUT_S = 1800.0
T = TypeVar("T")


class ClusterContestant:
    """A running cluster and a client of its first coordinator."""

    is_ours = True
    prefills_first = False

    def __init__(self, name: str, config: ClusterConfig, cores: int, console: Console) -> None:
        """Starts it, and waits until it is ready. Raises RuntimeFailure; then nothing of it is left running."""
        self._config = replace(config, auth_token=secrets.token_urlsafe(32))
        self._name = name
        self._cores = cores
        self._runner = asyncio.Runner()
        self._client: CoordinatorClient | None = None
        self._supervisor: SupervisorClient = ensure_supervisor(self._config)
        try:
            self._status = watch_start(self._supervisor.status, console, timeout_s=START_TIMEOUT_S)
            self._client = self._on_loop(self._connect(self._status))
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        return self._name

    @property
    def config(self) -> ClusterConfig:
        """What it was started with, the token that opens it included."""
        return self._config

    @property
    def facts(self) -> Mapping[str, object]:
        """The configuration, and what came of it."""
        kernels = sorted({one.kernel for one in self._status.replicas})
        return {
            "transport": self._config.transport,
            "kernel": "+".join(kernels),
            "expert_processes": len(self._status.replicas),
            "experts_per_actor": self._config.experts_per_actor,
            "replicas": self._config.replicas,
            "max_num_batched_tokens": self._config.max_num_batched_tokens,
            "map_epoch": self._status.map_epoch,
        }

    def generate(self, prompts: Prompts, output_len: int) -> Sample:
        """Raises BenchError or CoordinatorLost."""
        assert self._client is not None, "the cluster is closed"
        parallel = min(self._cores, len(self._status.replicas))
        target = drive.Target(client=self._client, parallel=parallel, read_cpu=self._cpu_times)
        if output_len == 1:
            return self._on_loop(drive.prefill(target, prompts))
        return self._on_loop(drive.decode(target, prompts, output_len))

    def measure(self, work: Callable[[CoordinatorClient], Coroutine[Any, Any, T]]) -> T:
        """Does `work` with the client of its first coordinator."""
        assert self._client is not None, "the cluster is closed"
        return self._on_loop(work(self._client))

    def memory(self) -> Mapping[str, object]:
        """Of the processes that hold weights: coordinators and experts."""
        members: list[CoordinatorStatus | ReplicaStatus] = [*self._status.coordinators, *self._status.replicas]
        weights = sum(one.weight_bytes for one in members)
        return memory_use([one.pid for one in members], weights).to_json()

    def close(self) -> None:
        """Retires the whole cluster, whatever state it is in."""
        try:
            if self._client is not None:
                self._on_loop(self._client.close())
                self._client = None
        finally:
            self._runner.close()
            self._supervisor.retire()

    def _cpu_times(self) -> CpuTimes:
        return CpuTimes(
            experts_s=cpu_seconds(one.pid for one in self._status.replicas),
            coordinators_s=cpu_seconds(one.pid for one in self._status.coordinators),
        )

    async def _connect(self, status: ClusterStatus) -> CoordinatorClient:
        client = CoordinatorClient(status.coordinators[0].address, self._credentials())
        await client.connect()
        return client

    def _credentials(self) -> WireCredentials:
        assert self._config.auth_token is not None, "set in the constructor"
        return WireCredentials(self._config.auth_token)

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)
