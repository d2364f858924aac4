"""How `octavo serve` opens its front door and ends it: Ray Serve's proxy, and the ingress behind it.

A module of its own because importing it takes a second, for which there is time while Ray starts.
"""

from actors import ray_serve
from actors.ingress import build_app
from cluster.config import ClusterConfig


def open_front_door(config: ClusterConfig, host: str, port: int) -> None:
    """Starts HTTP, and waits until the ingress answers. Raises RuntimeFailure."""
    ray_serve.start_http(host, port)
    ray_serve.deploy(build_app(config), name=config.namespace)


def end_front_door(name: str, *, wait: bool = True) -> None:
    """See `actors.ray_serve.undeploy`."""
    ray_serve.undeploy(name, wait=wait)
