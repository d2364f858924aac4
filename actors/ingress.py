"""The front door as one Ray Serve application: what `serve run`, a Serve config and `octavo serve` deploy.

    serve run actors.ingress:build_app model=/path/to/checkpoint replicas=2

Routes are `actors.front.http_app`'s work, the cluster behind them `actors.supervision.launch`'s. Only this file and
`actors.ray_serve` know Ray Serve.
"""

import asyncio
import functools
import logging
import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from actors import ray_runtime
from actors.front.coordinator_client import CoordinatorClient
from actors.front.follower import keep_following
from actors.front.front_door import LONGEST_HOLD_S, FrontDoor, FrontLimits, load_front
from actors.front.http_app import create_app
from actors.front.key_file import load_keys
from actors.front.openai_errors import OVERLOADED_RETRY_AFTER_S, param_of
from actors.front.proxy_guard import is_guarded
from actors.front.scrape import Look, nobody
from actors.supervision.client import SUPERVISOR_NAME
from actors.supervision.launch import Endpoints, ensure_cluster
from actors.supervision.status import ClusterStatus
from actors.tracing.opening import is_traced, open_tracer, process_name
from cluster.config import ClusterConfig, ConfigError
from cluster.waiting_queue import STANDING_SHARE

LOG = logging.getLogger(__name__)

# Requests beyond those that generate: health, metrics, and refusals on their way out.
_SPARE_REQUESTS = 256
_MAX_CONSTRUCTOR_RETRIES = 3
_HEALTH_PERIOD_S = 2.0
_LOOK_TIMEOUT_S = 10.0
_STATUS_TIMEOUT_S = 5.0
_LOOK_AGAIN_S = 5.0


def build_app(args: dict[str, Any] | ClusterConfig) -> serve.Application:
    """The Serve application for a cluster. `args` are `ClusterConfig`'s fields; the texts of a command line do.

    Raises ConfigError naming the field when one is unknown, missing or wrong.
    """
    config = args if isinstance(args, ClusterConfig) else parse_args(args)
    is_traced(config)
    deployment = serve.deployment(
        name="ingress",
        **_replicas(config),
        max_ongoing_requests=limits_of(config).max_requests + _SPARE_REQUESTS,
        max_queued_requests=_SPARE_REQUESTS,
        max_constructor_retry_count=_MAX_CONSTRUCTOR_RETRIES,
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        ray_actor_options={"num_cpus": 0},
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=OVERLOADED_RETRY_AFTER_S),
    )
    return deployment(serve.ingress()(Ingress)).bind(config)


def _replicas(config: ClusterConfig) -> dict[str, Any]:
    """How many ingresses: so many, or as Serve's own autoscaling has it between two limits."""
    scaling = config.ingress_scaling(config.ingresses)
    if scaling is None:
        return {"num_replicas": config.ingresses}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scaling.min_ingresses,
            max_replicas=scaling.max_ingresses,
            initial_replicas=scaling.first,
            target_ongoing_requests=scaling.target_requests,
            upscale_delay_s=scaling.up_s,
            downscale_delay_s=scaling.down_s,
        )
    }


def parse_args(args: dict[str, Any]) -> ClusterConfig:
    """A configuration out of plain values. Raises ConfigError naming the field."""
    try:
        return TypeAdapter(ClusterConfig).validate_python(args)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        field = param_of(details["loc"])
        if details["type"] == "unexpected_keyword_argument":
            raise ConfigError(f"unknown argument {field!r}") from None
        if details["type"] == "missing_argument" or details["type"].startswith("missing"):
            raise ConfigError(f"argument {field!r} is missing") from None
        reason = details["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{field}: {reason}" if field else reason) from None


def limits_of(config: ClusterConfig) -> FrontLimits:
    """As many requests as the coordinators can run or keep waiting, so that refusals are theirs to word."""
    per_coordinator = config.max_num_seqs + config.max_waiting_requests
    most = config.max_coordinators or config.coordinators
    return FrontLimits(
        max_requests=most * per_coordinator + 1,
        resume_s=config.resume_s,
        hold_s=min(LONGEST_HOLD_S, config.max_queue_wait_s * STANDING_SHARE / 2),
    )


async def open_front(config: ClusterConfig, endpoints: Endpoints, look: Look = nobody) -> FrontDoor:
    """A front door onto a running cluster; `look` asks its supervisor. Raises what `load_front` raises, KeysError."""
    keys = load_keys(config.api_keys_file, config.api_key)
    if keys is None:
        LOG.warning("there are no API keys: whoever reaches the HTTP port may use this server")
    return await asyncio.to_thread(
        load_front,
        Path(endpoints.model_path),
        _clients(endpoints),
        model_id=endpoints.served_model_name,
        max_model_len=endpoints.max_model_len,
        system_fingerprint=endpoints.system_fingerprint,
        request_timeout_s=config.request_timeout_s,
        limits=limits_of(config),
        look=look,
        routed_experts=config.enable_return_routed_experts,
        keys=keys,
        cors_origins=config.origins,
        spans=open_tracer(config, "ingress", process_name()),
        is_guarded=is_guarded(os.environ),
    )


def _clients(endpoints: Endpoints) -> list[CoordinatorClient]:
    return [CoordinatorClient(address, endpoints.credentials) for address in endpoints.coordinators]


class Ingress:
    """One replica of the front door. It is ready when the cluster is; what serves is in `actors.front`."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor: waits for the cluster, starting it where there is none."""
        front = await open_front(self._config, await ensure_cluster(self._config), self._status)
        config = self._config
        follow = functools.partial(
            keep_following,
            front.coordinators,
            self._look,
            config.min_coordinators or config.coordinators,
            again_s=None if config.count_policy is None else _LOOK_AGAIN_S,
        )
        return create_app(front, background=follow, says_request_ids=False)  # Serve's proxy does

    async def _look(self) -> dict[str, CoordinatorClient]:
        """Where the coordinators are now. In a thread, because Ray's look-up of a name blocks while its head is away.

        Raises TimeoutError when the cluster is not ready for that long.
        """
        endpoints = await asyncio.to_thread(lambda: asyncio.run(_endpoints(self._config)))
        return {client.address: client for client in _clients(endpoints)}

    async def _status(self) -> ClusterStatus | None:
        """How the supervisor sees the cluster; None without one. Raises RuntimeFailure or TimeoutError."""
        find = functools.partial(ray_runtime.find, SUPERVISOR_NAME, self._config.namespace)
        supervisor = await ray_runtime.aside(find)
        if supervisor is None:
            return None
        return ClusterStatus.from_dict(await supervisor.call("status", timeout_s=_STATUS_TIMEOUT_S))


async def _endpoints(config: ClusterConfig) -> Endpoints:
    async with asyncio.timeout(_LOOK_TIMEOUT_S):
        return await ensure_cluster(config)
