"""How a process that is not part of the cluster gets one: checks what can be checked, and starts the supervisor.

The command line and every ingress replica come through here, so `octavo serve`, `serve run` and a Serve config
start the same cluster. What the cluster then does is the supervisor's work.
"""

import asyncio
import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from actors import ray_runtime
from actors.channels import WireCredentials
from actors.gpus import num_gpus
from actors.ray_runtime import ActorLost, RuntimeFailure
from actors.supervision.blueprint import Blueprint, process_env
from actors.supervision.client import CALL_TIMEOUT_S, SUPERVISOR_NAME, SupervisorClient
from actors.supervision.runtime import Actor, Runtime
from actors.supervision.supervisor import Supervisor
from cluster.budget import memory_budget
from cluster.config import ClusterConfig, ConfigError
from model.storage.ledger import Ledger

READY_POLL_S = 0.5
START_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Where an ingress finds the cluster, and how it calls itself."""

    coordinators: tuple[str, ...]
    credentials: WireCredentials
    model_path: str
    served_model_name: str
    max_model_len: int
    system_fingerprint: str


def read_model(config: ClusterConfig) -> Ledger:
    """Opens the checkpoint (headers only) and checks the configuration against it.

    Raises ConfigError, ModelConfigError or CheckpointError.
    """
    path = Path(config.model)
    if not path.is_dir():
        raise ConfigError(f"model is {config.model!r}, but there is no such directory")
    checkpoint = Ledger.open(path)
    config.check_model(checkpoint.config.num_experts, checkpoint.config.max_context)
    config.check_layers(checkpoint.config.num_layers)
    return checkpoint


def check_memory(config: ClusterConfig, checkpoint: Ledger) -> None:
    """Raises RuntimeFailure when this machine cannot hold the whole cluster."""
    available = psutil.virtual_memory().available
    needs = Blueprint(config, checkpoint, float(num_gpus())).needs(available)
    budget = memory_budget("this machine", needs, available)
    if not budget.fits:
        raise RuntimeFailure(budget.reason)


def ensure_supervisor(config: ClusterConfig, runtime: Runtime = ray_runtime) -> SupervisorClient:
    """The running supervisor, started if there is none."""
    return SupervisorClient(_ensure_actor(config, runtime))


async def ensure_cluster(config: ClusterConfig, runtime: Runtime = ray_runtime) -> Endpoints:
    """Waits until a cluster for `config` is ready, starting it where there is none.

    Raises RuntimeFailure when one of its actors fails for good, or none is ready after START_TIMEOUT_S.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        actor = _ensure_actor(config, runtime)
        try:
            found = await actor.call("endpoints", timeout_s=CALL_TIMEOUT_S)
            if found is not None:
                return Endpoints(**found)
        except (ActorLost, TimeoutError):
            pass  # the supervisor is being replaced; the next round finds or starts one
        if time.monotonic() > deadline:
            raise RuntimeFailure(f"the cluster was not ready after {START_TIMEOUT_S:g} s")
        await asyncio.sleep(READY_POLL_S)


def _ensure_actor(config: ClusterConfig, runtime: Runtime) -> Actor:
    """Ray restarts a supervisor that dies, with the same arguments: so the token is drawn here, once."""
    found = runtime.find(SUPERVISOR_NAME, config.namespace)
    if found is not None:
        return found
    return runtime.spawn(
        Supervisor,
        name=SUPERVISOR_NAME,
        namespace=config.namespace,
        kwargs={"config": replace(config, auth_token=config.auth_token or secrets.token_urlsafe(32))},
        env=process_env(threads=1),
        restarts=True,
        on_head=True,
    )
