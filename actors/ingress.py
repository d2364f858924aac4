"""The front door as one Ray Serve application: what `serve run`, a Serve config and `octavo serve` deploy.

    serve run actors.ingress:build_app model=/path/to/checkpoint replicas=2

Routes are `actors.front.http_app`'s work, the cluster behind them `actors.supervision.launch`'s. Only this file and
`actors.ray_runtime` know Ray Serve.
"""

import asyncio
import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.serve.config import BackpressureConfig

from actors.front.coordinator_client import CoordinatorClient
from actors.front.front_door import FrontDoor, FrontLimits, load_front
from actors.front.http_app import create_app
from actors.front.openai_errors import OVERLOADED_RETRY_AFTER_S, param_of
from actors.supervision.launch import Endpoints, ensure_cluster
from cluster.config import ClusterConfig, ConfigError

LOG = logging.getLogger(__name__)

# Requests beyond those that generate: health, metrics, and refusals on their way out.
_SPARE_REQUESTS = 256
_MAX_CONSTRUCTOR_RETRIES = 3
_HEALTH_PERIOD_S = 2.0
_REFRESH_TIMEOUT_S = 10.0


def build_app(args: dict[str, Any] | ClusterConfig) -> serve.Application:
    """The Serve application for a cluster. `args` are `ClusterConfig`'s fields; the texts of a command line do.

    Raises ConfigError naming the field when one is unknown, missing or wrong.
    """
    config = args if isinstance(args, ClusterConfig) else parse_args(args)
    deployment = serve.deployment(
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=limits_of(config).max_requests + _SPARE_REQUESTS,
        max_queued_requests=_SPARE_REQUESTS,
        max_constructor_retry_count=_MAX_CONSTRUCTOR_RETRIES,
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        ray_actor_options={"num_cpus": 0},
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=OVERLOADED_RETRY_AFTER_S),
    )
    return deployment(serve.ingress()(Ingress)).bind(config)


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
    return FrontLimits(max_requests=config.coordinators * per_coordinator + 1)


async def open_front(config: ClusterConfig, endpoints: Endpoints) -> FrontDoor:
    """A front door onto a running cluster. Raises what `load_front` raises."""
    return await asyncio.to_thread(
        load_front,
        Path(endpoints.model_path),
        _clients(endpoints),
        model_id=endpoints.served_model_name,
        max_model_len=endpoints.max_model_len,
        system_fingerprint=endpoints.system_fingerprint,
        request_timeout_s=config.request_timeout_s,
        limits=limits_of(config),
    )


def _clients(endpoints: Endpoints) -> list[CoordinatorClient]:
    return [CoordinatorClient(address, endpoints.credentials) for address in endpoints.coordinators]


class Ingress:
    """One replica of the front door. It is ready when the cluster is."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._front: FrontDoor | None = None

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor: waits for the cluster, starting it where there is none."""
        self._front = await open_front(self._config, await ensure_cluster(self._config))
        return create_app(self._front)

    async def check_health(self) -> None:
        """Serve's periodic question. A coordinator that is away may have been replaced: asks where they are now."""
        if self._front is None or self._front.coordinators.all_connected:
            return
        try:
            endpoints = await asyncio.wait_for(ensure_cluster(self._config), _REFRESH_TIMEOUT_S)
        except TimeoutError:
            LOG.warning("a coordinator is away and the cluster is not ready")
            return
        clients = {client.address: client for client in _clients(endpoints)}
        await self._front.coordinators.follow(endpoints.coordinators, clients.__getitem__)
