"""A scenario on a real cluster of this machine, started as `octavo serve` starts it but without HTTP.

What runs on it, and what comes of that, is `experiments.scenario.live_run`'s.
"""

import asyncio
import dataclasses
import secrets
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from actors import ray_runtime
from actors.channels import WireCredentials
from actors.command.progress import watch_start
from actors.front.coordinator_client import CoordinatorClient
from actors.supervision.launch import ensure_supervisor
from actors.supervision.runtime import Runtime
from cluster.config import ClusterConfig
from cluster.simulate import SimulationResult
from experiments.scenario.live_run import LiveCluster
from experiments.scenario.load import phase_loads
from experiments.scenario.schema import Scenario, ScenarioError
from experiments.scenario.slow_experts import runtime_for
from experiments.scenario.texts import TextSource

T = TypeVar("T")

NAMESPACE = "octavo-experiment"
START_TIMEOUT_S = 1800.0
CHOSEN = ("model", "namespace", "auth_token", "max_num_seqs", "max_num_batched_tokens", "balance", "balance_policy")


def live_config(scenario: Scenario, model: Path, policy: str) -> ClusterConfig:
    """The cluster that the scenario asks for. Balancing fields are given only where a policy needs them.

    Raises ScenarioError, or ConfigError for a value out of its limits.
    """
    known = {one.name for one in dataclasses.fields(ClusterConfig)}
    for name in scenario.live.config:
        if name not in known or name in CHOSEN:
            problem = "chosen by the scenario itself" if name in CHOSEN else "not a field of ClusterConfig"
            raise ScenarioError(f"live.config.{name[:60]} is {problem}")
    balance: dict[str, Any] = {} if policy == "static" else {"balance": "on", "balance_policy": policy}
    if balance and "balance" not in known:
        raise ScenarioError(f"policies has {policy!r}, but this version does not balance live: only static")
    return ClusterConfig(
        model=str(model),
        namespace=f"{NAMESPACE}-{secrets.token_hex(4)}",  # nobody finds the one before, which may be about to end
        auth_token=secrets.token_urlsafe(32),
        max_num_seqs=scenario.max_num_seqs,
        max_num_batched_tokens=scenario.max_num_batched_tokens,
        **balance,
        **{"prefix_caching": False, **scenario.live.config},  # the simulation knows of none
    )


def run_live(scenario: Scenario, model: Path, policy: str, seed: int, console: Console) -> SimulationResult:
    """One policy, one seed: starts the cluster, runs the phases, ends it. Ray must have been joined."""

    async def play(cluster: LiveCluster) -> SimulationResult:
        return await cluster.run(scenario, phase_loads(scenario, seed))

    config = live_config(scenario, model, policy)
    return with_cluster(scenario, config, model, console, play, seed)


def with_cluster(
    scenario: Scenario,
    config: ClusterConfig,
    model: Path,
    console: Console,
    play: "Callable[[LiveCluster], Coroutine[None, None, T]]",
    seed: int | None = None,
) -> T:
    """What `play` makes of a cluster that is ended afterwards. Texts are by the scenario's first seed, or by `seed`."""
    assert config.auth_token is not None, "set by live_config"
    live = scenario.live
    with runtime_for(live.row_us, own_devices=live.own_devices) as runtime:
        return _with_cluster(config, model, scenario.seeds[0] if seed is None else seed, console, play, runtime)


def _with_cluster(
    config: ClusterConfig,
    model: Path,
    seed: int,
    console: Console,
    play: "Callable[[LiveCluster], Coroutine[None, None, T]]",
    runtime: Runtime,
) -> T:
    supervisor = ensure_supervisor(config, runtime)
    try:
        status = watch_start(supervisor.status, console, timeout_s=START_TIMEOUT_S)
        credentials = WireCredentials(str(config.auth_token))

        async def connected() -> T:
            client = CoordinatorClient(status.coordinators[0].address, credentials)
            texts = TextSource(model, seed, status.coordinators[0].max_model_len)
            try:
                await client.connect()
                return await play(LiveCluster(client, texts, supervisor))
            finally:
                await client.close()

        return asyncio.run(connected())
    finally:
        supervisor.retire()


def join_ray(num_cpus: int | None) -> None:
    """A Ray of our own, which ends with this process."""
    ray_runtime.start_local(NAMESPACE, num_cpus=num_cpus)
