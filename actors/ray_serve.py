"""Ray Serve: its HTTP proxy, and applications that are deployed and ended. What ours is, is said in `actors.ingress`.

Beside `actors.ray_runtime` because most processes of a cluster have nothing to do with Serve, whose import takes most
of a second.
"""

import contextlib
import logging

from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

from actors.ray_runtime import RayError, RuntimeFailure, check_port, first_line


def start_http(host: str, port: int) -> None:
    """Starts Serve's HTTP proxy. Raises RuntimeFailure if the port is taken."""
    check_port(host, port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    options = HTTPOptions(host=host, port=port, keep_alive_timeout_s=75)
    try:
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options)
    except (RuntimeError, RayError) as error:
        raise RuntimeFailure(f"the HTTP proxy did not start: {first_line(error)}") from None


def deploy(application: serve.Application, *, name: str) -> None:
    """Deploys a Serve application and waits until it answers. Raises RuntimeFailure."""
    try:
        serve.run(application, name=name, route_prefix="/")
    except (RuntimeError, RayError) as error:
        raise RuntimeFailure(f"the HTTP front door did not start: {first_line(error)}") from None


def undeploy(name: str, *, wait: bool = True) -> None:
    """Ends an application, whose replicas first answer what they have. Serve itself, which others may use, stays."""
    with contextlib.suppress(RayError, RuntimeError):
        serve.delete(name, _blocking=wait)
