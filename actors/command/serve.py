"""`octavo serve`: brings a whole cluster up in order, and takes it down in order.

Everything that can be refused without a cluster (paths, ports, memory, a second start) is refused before Ray starts.
"""

import threading
from concurrent.futures import Future
from contextlib import ExitStack
from ipaddress import ip_address

from rich.console import Console
from rich.markup import escape

from actors import ray_runtime
from actors.command.cache_dir import user_cache_dir
from actors.command.local_record import LocalRecord
from actors.command.manifest import hold_to_manifest
from actors.command.progress import show_placement, watch_start
from actors.command.stages import Stages
from actors.command.stop_signals import StopSignals
from actors.front.key_file import load_keys
from actors.ray_runtime import RuntimeFailure
from actors.supervision.client import SupervisorClient, find_supervisor
from actors.supervision.launch import check_memory, ensure_supervisor, read_model
from actors.supervision.status import ClusterStatus
from actors.tracing.opening import is_traced
from cluster.config import ClusterConfig, ConfigError
from model.storage.ledger import Ledger

START_TIMEOUT_S = 1800.0


def check_access(config: ClusterConfig, host: str, *, no_auth: bool) -> None:
    """Refuses to serve strangers by oversight. Raises ConfigError, and KeysError where the keys cannot be used."""
    load_keys(config.api_keys_file, config.api_key)
    if config.needs_key and no_auth:
        raise ConfigError("--no-auth contradicts the API keys that are given")
    if not config.needs_key and not no_auth and not _is_loopback(host):
        raise ConfigError(
            f"HTTP would serve whoever reaches {host}: give --api-keys FILE or OCTAVO_API_KEY, or say --no-auth"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(config: ClusterConfig, *, host: str, port: int, address: str | None, console: Console) -> None:
    """Serves until SIGINT or SIGTERM, then drains and leaves nothing running; a second signal ends the draining.

    `address` names a Ray cluster to join; None starts one that ends with this process. Raises what
    `actors.command.failures.known_errors` lists; whatever was started is stopped first.
    """
    stages = Stages()
    is_traced(config)
    with stages.stage("checkpoint"):
        model = read_model(config)
    ray_runtime.check_port(host, port)
    with stages.stage("checksums"):
        model = hold_to_manifest(model, console)
    with ExitStack() as undo:
        with stages.stage("Ray"):
            _join_ray(config, host, port, address, model, console, undo)
        stop = StopSignals().install()
        _refuse_another(config)
        with stages.stage("HTTP"):
            _start_http(host, port)
        with stages.stage("supervisor"):
            supervisor = _start_supervisor(config, undo)
        console.print(
            f"loading {config.model} (Ray at {ray_runtime.address()}, logs {ray_runtime.session_dir()})",
            soft_wrap=True,
            markup=False,
        )
        undo.callback(_undeploy, config.namespace, supervisor, stop)
        front_door = _open_front_door(config, stages)
        with stages.stage("experts and coordinators"):
            status = watch_start(lambda: _poll(supervisor, stop.asked), console, timeout_s=START_TIMEOUT_S)
        show_placement(status, console)
        front_door.result()
        undo.callback(stop.unless_hurried, lambda: supervisor.drain(config.drain_timeout_s))
        console.print(f"\n  {stages} (side by side)", soft_wrap=True)
        console.print(_banner(status, host, port, stages.total_s, needs_key=config.needs_key), soft_wrap=True)
        if not config.needs_key and not _is_loopback(host):
            console.print("  no API keys: whoever reaches this port may use it (--no-auth)\n", soft_wrap=True)
        stop.asked.wait()
        console.print(f"draining for up to {config.drain_timeout_s:g} s; Ctrl-C ends it at once ...")
    console.print("stopped")


def _join_ray(
    config: ClusterConfig,
    host: str,
    port: int,
    address: str | None,
    model: Ledger,
    console: Console,
    undo: ExitStack,
) -> None:
    """A Ray of our own, if there is memory for the cluster and none runs yet, or the one at `address`."""
    if address is None:
        record = undo.enter_context(LocalRecord(user_cache_dir()).hold(f"http://{host}:{port}"))
        check_memory(config, model)
        console.print("starting Ray ...")
        ray_runtime.start_local(config.namespace, meanwhile=_import_front_door)
        record.write(ray_address=ray_runtime.address())
    else:
        ray_runtime.connect(address, config.namespace)
    undo.callback(ray_runtime.disconnect)


def _import_front_door() -> None:
    """Serve, FastAPI and the ingress take a second to import: while Ray starts, there is a processor for it."""
    import actors.command.front_door  # noqa: F401


def _start_http(host: str, port: int) -> None:
    """Before experts are asked for: Ray starts few workers at a time, and Serve gives a proxy seconds to have one."""
    from actors.command.front_door import start_http

    start_http(host, port)


def _open_front_door(config: ClusterConfig, stages: Stages) -> Future[None]:
    """Starts the ingress, which waits for experts that load. Its thread must not keep a failed start alive."""
    opened: Future[None] = Future()

    def work() -> None:
        try:
            with stages.stage("ingress"):
                from actors.command.front_door import open_front_door

                open_front_door(config)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits, whatever it is
            opened.set_exception(error)
        else:
            opened.set_result(None)

    threading.Thread(target=work, name="front door", daemon=True).start()
    return opened


def _refuse_another(config: ClusterConfig) -> None:
    if find_supervisor(config.namespace) is not None:
        raise RuntimeFailure(f"an octavo cluster named {config.namespace!r} already runs there: see octavo status")


def _start_supervisor(config: ClusterConfig, undo: ExitStack) -> SupervisorClient:
    _refuse_another(config)  # who came while HTTP was started
    supervisor = ensure_supervisor(config)
    undo.callback(supervisor.retire)
    return supervisor


def _undeploy(name: str, supervisor: SupervisorClient, stop: StopSignals) -> None:
    """Ends the front door, whose requests have ended; in a hurry, those that have not are ended first."""
    from actors.command.front_door import end_front_door

    if not stop.unless_hurried(lambda: end_front_door(name)):
        supervisor.retire()
        end_front_door(name, wait=False)


def _poll(supervisor: SupervisorClient, stop: threading.Event) -> ClusterStatus:
    if stop.is_set():
        raise RuntimeFailure("stopped before it was ready")
    return supervisor.status()


def _banner(status: ClusterStatus, host: str, port: int, seconds: float, *, needs_key: bool) -> str:
    name = host if ":" not in host else f"[{host}]"
    url = f"http://{name if name not in ('0.0.0.0', '[::]') else '127.0.0.1'}:{port}"
    body = (
        f'{{"model": "{escape(status.model)}", "max_tokens": 64, "temperature": 0, '
        '"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    )
    key = '    -H "Authorization: Bearer $OPENAI_API_KEY" \\\n' if needs_key else ""
    return (
        f"\n[bold green]ready in {seconds:.0f} s[/bold green]  {url}\n\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n{key}"
        f"    -d '{body}'\n\n"
        "  octavo chat, octavo status; Ctrl-C drains and stops\n"
    )
