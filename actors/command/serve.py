"""`octavo serve`: brings a whole cluster up in order, and takes it down in order.

Everything that can be refused without a cluster (paths, ports, memory, a second start) is refused before Ray starts.
"""

import signal
import threading
from concurrent.futures import Future
from contextlib import ExitStack

from rich.console import Console
from rich.markup import escape

from actors import ray_runtime
from actors.command.cache_dir import user_cache_dir
from actors.command.local_record import LocalRecord
from actors.command.progress import show_placement, watch_start
from actors.command.stages import Stages
from actors.ingress import build_app
from actors.ray_runtime import RuntimeFailure
from actors.supervision.client import SupervisorClient, find_supervisor
from actors.supervision.launch import check_memory, ensure_supervisor, read_model
from actors.supervision.status import ClusterStatus
from cluster.config import ClusterConfig
from model.storage.checkpoint import Checkpoint

START_TIMEOUT_S = 1800.0


def serve(config: ClusterConfig, *, host: str, port: int, address: str | None, console: Console) -> None:
    """Serves until SIGINT or SIGTERM, then drains and leaves nothing running.

    `address` names a Ray cluster to join; None starts one that ends with this process. Raises what
    `actors.command.failures.known_errors` lists; whatever was started is stopped first.
    """
    stages = Stages()
    with stages.stage("checkpoint"):
        model = read_model(config)
    ray_runtime.check_port(host, port)
    with ExitStack() as undo:
        with stages.stage("Ray"):
            _join_ray(config, host, port, address, model, console, undo)
        stop = _stop_signal()
        with stages.stage("supervisor"):
            supervisor = _start_supervisor(config, undo)
        console.print(
            f"loading {config.model} (Ray at {ray_runtime.address()}, logs {ray_runtime.session_dir()})",
            soft_wrap=True,
            markup=False,
        )
        undo.callback(ray_runtime.undeploy, config.namespace)
        front_door = _open_front_door(config, host, port, stages)
        with stages.stage("experts and coordinators"):
            status = watch_start(lambda: _poll(supervisor, stop), console, timeout_s=START_TIMEOUT_S)
        show_placement(status, console)
        front_door.result()
        undo.callback(supervisor.drain, config.drain_timeout_s)
        console.print(f"\n  {stages} (side by side)", soft_wrap=True)
        console.print(_banner(status, host, port, stages.total_s), soft_wrap=True)
        stop.wait()
        console.print("draining ...")
    console.print("stopped")


def _join_ray(
    config: ClusterConfig,
    host: str,
    port: int,
    address: str | None,
    model: Checkpoint,
    console: Console,
    undo: ExitStack,
) -> None:
    """A Ray of our own, if there is memory for the cluster and none runs yet, or the one at `address`."""
    if address is None:
        record = undo.enter_context(LocalRecord(user_cache_dir()).hold(f"http://{host}:{port}"))
        check_memory(config, model)
        console.print("starting Ray ...")
        ray_runtime.start_local(config.namespace)
        record.write(ray_address=ray_runtime.address())
    else:
        ray_runtime.connect(address, config.namespace)
    undo.callback(ray_runtime.disconnect)


def _open_front_door(config: ClusterConfig, host: str, port: int, stages: Stages) -> Future[None]:
    """Starts HTTP while the experts load: the ingress waits for them. Its thread must not keep a failed start alive."""
    opened: Future[None] = Future()

    def work() -> None:
        try:
            with stages.stage("HTTP"):
                ray_runtime.start_http(host, port)
                ray_runtime.deploy(build_app(config), name=config.namespace)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits, whatever it is
            opened.set_exception(error)
        else:
            opened.set_result(None)

    threading.Thread(target=work, name="front door", daemon=True).start()
    return opened


def _start_supervisor(config: ClusterConfig, undo: ExitStack) -> SupervisorClient:
    if find_supervisor(config.namespace) is not None:
        raise RuntimeFailure(f"an octavo cluster named {config.namespace!r} already runs there: see octavo status")
    supervisor = ensure_supervisor(config)
    undo.callback(supervisor.retire)
    return supervisor


def _poll(supervisor: SupervisorClient, stop: threading.Event) -> ClusterStatus:
    if stop.is_set():
        raise RuntimeFailure("stopped before it was ready")
    return supervisor.status()


def _stop_signal() -> threading.Event:
    """An event set by SIGINT or SIGTERM, so that stopping happens in order and never in the middle of a call.

    Ray installs a SIGTERM handler of its own, so this comes after it.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _banner(status: ClusterStatus, host: str, port: int, seconds: float) -> str:
    name = host if ":" not in host else f"[{host}]"
    url = f"http://{name if name not in ('0.0.0.0', '[::]') else '127.0.0.1'}:{port}"
    body = (
        f'{{"model": "{escape(status.model)}", "max_tokens": 64, "temperature": 0, '
        '"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    )
    return (
        f"\n[bold green]ready in {seconds:.0f} s[/bold green]  {url}\n\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"    -d '{body}'\n\n"
        "  octavo chat, octavo status; Ctrl-C drains and stops\n"
    )
