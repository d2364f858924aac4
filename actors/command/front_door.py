"""How `octavo serve` opens its front door and ends it: Ray Serve's proxy, and the ingress behind it.

A module of its own because importing it takes a second, for which there is time while Ray starts.
"""

from actors import ray_serve
from actors.ingress import build_app
from cluster.config import ClusterConfig


def start_http(host: str, port: int) -> None:
    """See `actors.ray_serve.start_http`."""
    ray_serve.start_http(host, port)


def open_front_door(config: ClusterConfig) -> None:
    """Starts the ingress behind the proxy, and waits until it answers. Raises RuntimeFailure."""
    ray_serve.deploy(build_app(config), name=config.namespace)


def end_front_door(name: str, *, wait: bool = True) -> None:
    """See `actors.ray_serve.undeploy`."""
    ray_serve.undeploy(name, wait=wait)
