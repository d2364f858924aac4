"""The only module that talks to Ray's core API: clusters, nodes, named actors, and calls to them.

What to start where is decided in `cluster/` and ordered by `actors.supervision.supervisor`. Nothing here is on the data
plane: between two decode steps nobody calls this module.
"""

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray._private.utils import get_ray_address_file, read_ray_address
from ray.autoscaler.sdk import request_resources
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.util import metrics as ray_metrics
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import local_ray
from actors.process_start import with_env
from cluster.placement import is_role

LOG = logging.getLogger(__name__)

Result = TypeVar("Result")

RayError = ray.exceptions.RayError

NODE_ID_LABEL = "ray.io/node-id"
POLL_PAUSE_S = 0.5
SLIVER = 0.001
PROBE_TIMEOUT_S = 2.5  # time for a first packet that was lost to be sent again

# Calls that wait for Ray's head, which may be away for minutes. Few threads, and those who wait decide for how long.
_ASIDE = ThreadPoolExecutor(max_workers=8, thread_name_prefix="ray-head")


class RuntimeFailure(RuntimeError):
    """Ray refused something: no cluster at an address, a name already taken, resources that nobody has."""


class ActorLost(RuntimeFailure):
    """The actor is dead or its node is gone; the call may or may not have happened."""


class ActorUnreachable(ActorLost):
    """Nobody could be reached where the actor is; Ray does not know whether it lives."""


@dataclass(frozen=True, slots=True)
class RayNode:
    """One living node as Ray sees it. Memory in bytes, CPUs and GPUs in Ray's units (whole devices).

    `port` is where its raylet listens, 0 where there is none to ask. `roles` are its custom resources of the kind that
    `cluster.placement.is_role` knows: it was started for these only.
    """

    node_id: str
    address: str
    num_cpus: float
    num_gpus: float
    memory_bytes: int
    labels: Mapping[str, str]
    port: int = 0
    roles: frozenset[str] = frozenset()


class ActorRef:
    """A named actor somewhere in the cluster."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self._handle = handle

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Calls `method` from an event loop. Raises ActorLost, TimeoutError, or what the method raised."""
        reference = getattr(self._handle, method).remote(*args)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.wrap_future(reference.future())
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except RayError as error:
            raise self._lost(error) from None
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
        except RayError as error:
            raise self._lost(error) from None

    def _lost(self, error: Exception) -> ActorLost:
        kind = ActorUnreachable if isinstance(error, ray.exceptions.ActorUnavailableError) else ActorLost
        return kind(f"{self.name}: {first_line(error)}")

    def kill(self) -> None:
        """Ends the actor's process at once. Killing a dead actor is no error."""
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self._handle, no_restart=True)


def start_local(
    namespace: str,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    meanwhile: Callable[[], object] | None = None,
) -> None:
    """Starts a Ray of this process's own; it ends with the process. Raises RuntimeFailure.

    What is to be imported `meanwhile`, is imported by a thread while this one waits for Ray's processes. It must be
    something that will be imported again, where it is needed: there an error shows.

    Ray's own ports listen on every interface and cannot be told otherwise; what keeps strangers out is its token,
    which a local cluster asks for unless RAY_AUTH_MODE says differently (it must be set before Ray is imported).
    """
    local_ray.tell(os.environ)
    if meanwhile is not None:
        _import_beside(meanwhile)
    for last in (False, True):  # Ray gives its processes 30 s, which a busy machine may need twice
        try:
            ray.init(
                address="local",
                namespace=namespace,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                object_store_memory=128 * 1024 * 1024,
            )
            _pace_error_listener()
            return
        except Exception as error:  # noqa: BLE001 - Ray raises bare ones, "timed out during startup" among them
            ray.shutdown()
            if last:
                raise RuntimeFailure(f"Ray did not start: {first_line(error)}") from None
            LOG.warning("Ray did not start, trying once more: %s", first_line(error))


def _import_beside(meanwhile: Callable[[], object]) -> None:
    """In a thread, but what Ray imports first of all before that.

    Two threads in one package's circle of imports could each find it half made.
    """
    from ray.dashboard import optional_deps  # noqa: F401

    threading.Thread(target=meanwhile, name="meanwhile", daemon=True).start()


def connect(address: str, namespace: str) -> None:
    """Joins the Ray cluster at `address` ("auto" finds one on this machine). Raises RuntimeFailure."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
    except (RayError, RuntimeError, ValueError, OSError) as error:
        raise RuntimeFailure(f"no Ray cluster at {address!r}: {first_line(error)}") from None
    _pace_error_listener()


class _PacedSubscriber:
    """Ray's subscription to error messages, with a pause after a poll that had nothing to wait for.

    A driver polls it in a loop. While the head is away a poll returns at once, and that loop would burn a core.
    """

    def __init__(self, subscriber: Any) -> None:
        self._subscriber = subscriber
        self._closed = threading.Event()

    def subscribe(self) -> None:
        self._subscriber.subscribe()

    def poll(self, timeout: float | None = None) -> tuple[Any, Any]:
        began_s = time.monotonic()
        found: tuple[Any, Any] = self._subscriber.poll(timeout=timeout)
        if found[1] is None and time.monotonic() - began_s < POLL_PAUSE_S:
            self._closed.wait(POLL_PAUSE_S)
        return found

    def close(self) -> None:
        self._closed.set()
        self._subscriber.close()


def _pace_error_listener() -> None:
    worker = ray._private.worker.global_worker
    if not isinstance(worker.gcs_error_subscriber, _PacedSubscriber):
        worker.gcs_error_subscriber = _PacedSubscriber(worker.gcs_error_subscriber)


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


def forget(ended: str) -> None:
    """`ray start` writes an address down for whoever looks for a Ray on this machine: that of one that ended goes."""
    if read_ray_address() == ended:
        Path(get_ray_address_file(None)).unlink(missing_ok=True)


def own_node_id() -> str:
    """The Ray node on which the caller runs; empty outside Ray."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


async def aside(call: Callable[[], Result]) -> Result:
    """The result of a call of this module that waits for Ray's head, run in a thread beside the event loop.

    A caller that waits no longer cannot stop the call: it may still happen.
    """
    return await asyncio.get_running_loop().run_in_executor(_ASIDE, call)


def nodes() -> tuple[RayNode, ...]:
    """All living nodes, by id. Raises RuntimeFailure when Ray's head does not answer for long."""
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
    except RayError as error:
        raise RuntimeFailure(f"Ray's head did not say which nodes there are: {first_line(error)}") from None
    return tuple(
        RayNode(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            num_cpus=float(node["Resources"].get("CPU", 0)),
            num_gpus=float(node["Resources"].get("GPU", 0)),
            memory_bytes=int(node["Resources"].get("memory", 0)),
            labels=dict(node.get("Labels") or {}),
            port=int(node.get("NodeManagerPort", 0)),
            roles=frozenset(name for name, amount in node["Resources"].items() if is_role(name) and amount > 0),
        )
        for node in sorted(alive, key=lambda node: str(node["NodeID"]))
    )


async def unreachable(nodes: Iterable[RayNode]) -> frozenset[str]:
    """Ids of the nodes whose raylet takes no connection.

    Ray's head itself needs up to a minute to notice that a node is gone, and starts processes there until then.
    """
    asked = [node for node in nodes if node.port]
    answers = await asyncio.gather(*(_takes_connections(node.address, node.port) for node in asked))
    return frozenset(node.node_id for node, answers_now in zip(asked, answers, strict=True) if not answers_now)


async def _takes_connections(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


def request_nodes(num: int, resource: str, without: Collection[str] = ()) -> None:
    """Tells Ray's autoscaler that there should be so many nodes with this custom resource, besides those in `without`.

    It replaces what was told before, by anybody in this cluster; a Ray without an autoscaler takes note and does
    nothing. Autoscaler v2 forgets it with Ray's head, and does nothing at all where it may not start that many. Raises
    RuntimeFailure when the head does not answer.
    """
    # Otherwise it may count a node that is to go for one that is to stay, and let neither go. Version 1 ignores it.
    selector = {NODE_ID_LABEL: f"!in({','.join(sorted(without))})"} if without else {}
    try:
        is_autoscaler_v2(fetch_from_server=True)  # Ray remembers what the first cluster of this process had
        request_resources(bundles=[{resource: 1}] * num, bundle_label_selectors=[selector] * num)
    except (RayError, RuntimeError, OSError) as error:
        raise RuntimeFailure(f"Ray's head could not be asked for nodes: {first_line(error)}") from None


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


def metric(
    kind: Literal["gauge", "counter"], name: str, text: str, labels: tuple[str, ...]
) -> Callable[[float, Mapping[str, str]], None]:
    """A metric that this node's Ray shows to Prometheus as `ray_<name>`; returns what sets it, or adds to it."""
    if kind == "counter":
        counter = ray_metrics.Counter(name, text, labels)
        return lambda value, tags: counter.inc(value, dict(tags))
    gauge = ray_metrics.Gauge(name, text, labels)
    return lambda value, tags: gauge.set(value, dict(tags))


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
    on_head: bool = False,
    role: str | None = None,
) -> ActorRef:
    """Starts `actor_class(**kwargs)` as a detached, named actor with its own process, without waiting for it.

    Detached, so that it outlives whoever started it: the supervisor finds it again by name. `get_if_exists`
    makes two starters of one name agree on one actor. `env` is set before the actor is built, after its module was
    imported (see `actors.process_start`). `restarts` leaves restarting it to Ray. `on_head` puts it on
    the node of Ray's head: who can do nothing without the head should not be lost with another node. `role` is a
    custom resource of the node, of which a sliver is held: a node that holds somebody is not idle, and not taken away
    by Ray's autoscaler, also where no GPU is held. Raises RuntimeFailure.
    """
    # A hard affinity: a replica that was placed by name must not drift to a node that already has its twin.
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False) if node_id else "DEFAULT"
    options = ray.remote(with_env(actor_class, env)).options(
        name=name,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        num_gpus=num_gpus,
        resources={HEAD_NODE_RESOURCE_NAME: SLIVER} if on_head else {role: SLIVER} if role else None,
        max_restarts=-1 if restarts else 0,
        scheduling_strategy=strategy,
    )
    try:
        return ActorRef(name, options.remote(**kwargs))
    except (ValueError, RayError) as error:
        raise RuntimeFailure(f"{name} could not be started: {first_line(error)}") from None


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
    return cause if isinstance(cause, BaseException) else RuntimeFailure(first_line(error))


def first_line(error: BaseException) -> str:
    """What a person needs to read of an error of Ray's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "creation task" in lines[0]:
        return lines[-1]  # what the constructor raised, below its traceback
    return lines[0] if lines else type(error).__name__
