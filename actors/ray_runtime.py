"""The only module that talks to Ray's core API: clusters, nodes, named actors, and calls to them.

What to start where is decided in `cluster/` and ordered by `actors.supervision.supervisor`. Nothing here is on the data
plane: between two decode steps nobody calls this module.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LOG = logging.getLogger(__name__)


class RuntimeFailure(RuntimeError):
    """Ray refused something: no cluster at an address, a name already taken, resources that nobody has."""


class ActorLost(RuntimeFailure):
    """The actor is dead or its node is gone; the call may or may not have happened."""


@dataclass(frozen=True, slots=True)
class RayNode:
    """One living node as Ray sees it. Memory in bytes, CPUs and GPUs in Ray's units (whole devices)."""

    node_id: str
    address: str
    num_cpus: float
    num_gpus: float
    memory_bytes: int
    labels: Mapping[str, str]


class ActorRef:
    """A named actor somewhere in the cluster."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self._handle = handle

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Calls `method` from an event loop. Raises ActorLost, TimeoutError, or what the method raised."""
        reference = getattr(self._handle, method).remote(*args)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(reference.future()), timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.RayError as error:
            raise ActorLost(f"{self.name}: {_first_line(error)}") from None
        except TimeoutError:
            raise TimeoutError(f"{self.name}.{method} did not answer within {timeout_s:g} s") from None

    def call_sync(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Calls `method` from a thread without an event loop; raises as `call` does."""
        try:
            return ray.get(getattr(self._handle, method).remote(*args), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError(f"{self.name}.{method} did not answer within {timeout_s:g} s") from None
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.RayError as error:
            raise ActorLost(f"{self.name}: {_first_line(error)}") from None

    def kill(self) -> None:
        """Ends the actor's process at once. Killing a dead actor is no error."""
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(self._handle, no_restart=True)


def start_local(namespace: str, *, num_gpus: int | None = None) -> None:
    """Starts a Ray of this process's own; it ends with the process. Raises RuntimeFailure.

    Ray's own ports listen on every interface and cannot be told otherwise; what keeps strangers out is its token,
    which a local cluster asks for unless RAY_AUTH_MODE says differently (it must be set before Ray is imported).
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's workers are nice to everybody else by default; here they are what the machine is for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    for last in (False, True):  # Ray gives its processes 30 s, which a busy machine may need twice
        try:
            ray.init(
                address="local",
                namespace=namespace,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                num_gpus=num_gpus,
                object_store_memory=128 * 1024 * 1024,
            )
            return
        except Exception as error:  # noqa: BLE001 - Ray raises bare ones, "timed out during startup" among them
            ray.shutdown()
            if last:
                raise RuntimeFailure(f"Ray did not start: {_first_line(error)}") from None
            LOG.warning("Ray did not start, trying once more: %s", _first_line(error))


def connect(address: str, namespace: str) -> None:
    """Joins the Ray cluster at `address` ("auto" finds one on this machine). Raises RuntimeFailure."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
    except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as error:
        raise RuntimeFailure(f"no Ray cluster at {address!r}: {_first_line(error)}") from None


def is_connected() -> bool:
    """True in a driver after `start_local` or `connect`, and in every actor."""
    return bool(ray.is_initialized())


def disconnect() -> None:
    """Leaves the cluster; one that this process started ends with all its actors."""
    ray.shutdown()


def session_dir() -> str:
    """Where this node's Ray keeps its logs."""
    return str(ray._private.worker._global_node.get_session_dir_path())


def address() -> str:
    """The address with which another process can `connect` to this cluster."""
    return str(ray.get_runtime_context().gcs_address)


def own_node_id() -> str:
    """The Ray node on which the caller runs; empty outside Ray."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def nodes() -> tuple[RayNode, ...]:
    """All living nodes, by id."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return tuple(
        RayNode(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            num_cpus=float(node["Resources"].get("CPU", 0)),
            num_gpus=float(node["Resources"].get("GPU", 0)),
            memory_bytes=int(node["Resources"].get("memory", 0)),
            labels=dict(node.get("Labels") or {}),
        )
        for node in sorted(alive, key=lambda node: str(node["NodeID"]))
    )


def find(name: str, namespace: str) -> ActorRef | None:
    """The living actor of that name, or None."""
    try:
        return ActorRef(name, ray.get_actor(name, namespace=namespace))
    except ValueError:
        return None


def names(namespace: str) -> tuple[str, ...]:
    """Names of all living actors of a namespace."""
    listed = ray.util.list_named_actors(all_namespaces=True)
    return tuple(sorted(entry["name"] for entry in listed if entry["namespace"] == namespace))


def spawn(
    actor_class: type,
    *,
    name: str,
    namespace: str,
    kwargs: Mapping[str, Any],
    env: Mapping[str, str],
    node_id: str | None = None,
    num_gpus: float = 0.0,
    restarts: bool = False,
) -> ActorRef:
    """Starts `actor_class(**kwargs)` as a detached, named actor with its own process, without waiting for it.

    Detached, so that it outlives whoever started it: the supervisor finds it again by name. `get_if_exists`
    makes two starters of one name agree on one actor. `restarts` leaves restarting it to Ray. Raises
    RuntimeFailure.
    """
    # A hard affinity: a replica that was placed by name must not drift to a node that already has its twin.
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False) if node_id else "DEFAULT"
    options = ray.remote(actor_class).options(
        name=name,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        num_gpus=num_gpus,
        max_restarts=-1 if restarts else 0,
        scheduling_strategy=strategy,
        runtime_env={"env_vars": dict(env)},
    )
    try:
        return ActorRef(name, options.remote(**kwargs))
    except (ValueError, ray.exceptions.RayError) as error:
        raise RuntimeFailure(f"{name} could not be started: {_first_line(error)}") from None


def start_http(host: str, port: int) -> None:
    """Starts Serve's HTTP proxy. Raises RuntimeFailure if the port is taken."""
    check_port(host, port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    options = HTTPOptions(host=host, port=port, keep_alive_timeout_s=75)
    try:
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options)
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise RuntimeFailure(f"the HTTP proxy did not start: {_first_line(error)}") from None


def deploy(application: serve.Application, *, name: str) -> None:
    """Deploys a Serve application and waits until it answers. Raises RuntimeFailure."""
    try:
        serve.run(application, name=name, route_prefix="/")
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise RuntimeFailure(f"the HTTP front door did not start: {_first_line(error)}") from None


def undeploy(name: str) -> None:
    """Ends an application, whose replicas first answer what they have. Serve itself, which others may use, stays."""
    with contextlib.suppress(ray.exceptions.RayError, RuntimeError):
        serve.delete(name)


def check_port(host: str, port: int) -> None:
    """Raises RuntimeFailure when nobody could listen on host:port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RuntimeFailure(f"cannot listen on {host}:{port}: {error.strerror}") from None


def _cause(error: Any) -> BaseException:
    """What the actor's method itself raised, without Ray's wrapper."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else RuntimeFailure(_first_line(error))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "creation task" in lines[0]:
        return lines[-1]  # what the constructor raised, below its traceback
    return lines[0] if lines else type(error).__name__
