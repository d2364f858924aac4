"""What a person sees while the cluster starts: weights per actor with size and seconds, then where everything is."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from actors.ray_runtime import RuntimeFailure
from actors.supervision.status import ClusterStatus, CoordinatorStatus, ReplicaStatus, size

POLL_S = 0.25
# States that waiting will not mend; a replica that fits nowhere may wait for a node that is just joining.
_HOPELESS_AFTER_S = {"failed": 0.0, "refused": 0.0, "unplaced": 15.0}


def watch_start(
    poll: Callable[[], ClusterStatus], console: Console, *, timeout_s: float, poll_s: float = POLL_S
) -> ClusterStatus:
    """Shows loading until the cluster is ready, and returns its status.

    Raises RuntimeFailure naming the first actor that failed, or those still missing after `timeout_s`.
    """
    columns = (TextColumn("{task.description:>14}"), BarColumn(), DownloadColumn(binary_units=True))
    began = time.monotonic()
    said: set[str] = set()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}
        while True:
            status = poll()
            for actor_id, actor in _actors(status).items():
                _advance(bars, tasks, actor_id, actor)
                if actor.state == "ready" and actor_id not in said:
                    said.add(actor_id)
                    console.print(_loaded_line(actor_id, actor), soft_wrap=True, markup=False)
            if status.state == "ready":
                return status
            _raise_if_hopeless(status, time.monotonic() - began, timeout_s)
            time.sleep(poll_s)


def show_placement(status: ClusterStatus, console: Console) -> None:
    """Prints who is on which node, and what the KV caches hold."""
    by_node: dict[str, list[str]] = {}
    for actor_id, actor in _actors(status).items():
        by_node.setdefault(actor.node, []).append(actor_id)
    for node, actor_ids in sorted(by_node.items()):
        console.print(f"  node {node[:8]}: {', '.join(actor_ids)}", soft_wrap=True, markup=False)
    for one in status.coordinators:
        tokens = one.kv_blocks_total * one.kv_block_size
        console.print(
            f"  KV cache of {one.coordinator_id}: {one.kv_blocks_total} blocks of {one.kv_block_size} tokens "
            f"= {tokens:,} tokens; longest sequence {one.max_model_len:,}",
            soft_wrap=True,
        )


def _actors(status: ClusterStatus) -> dict[str, CoordinatorStatus | ReplicaStatus]:
    actors: dict[str, CoordinatorStatus | ReplicaStatus] = {}
    actors.update({one.coordinator_id: one for one in status.coordinators})
    actors.update({one.replica_id: one for one in status.replicas})
    return actors


def _advance(bars: Progress, tasks: dict[str, TaskID], actor_id: str, actor: CoordinatorStatus | ReplicaStatus) -> None:
    if actor_id not in tasks:
        tasks[actor_id] = bars.add_task(actor_id, total=None)
    total = max(actor.weight_bytes, actor.loaded_bytes) or None
    bars.update(tasks[actor_id], total=total, completed=actor.loaded_bytes, visible=actor.state != "ready")


def _loaded_line(actor_id: str, actor: CoordinatorStatus | ReplicaStatus) -> str:
    return (
        f"  {actor_id:<14} {size(actor.weight_bytes):>9} in {actor.load_s:4.1f} s  "
        f"{actor.kernel:<5} pid {actor.pid} at {actor.address}"
    )


def _raise_if_hopeless(status: ClusterStatus, waited_s: float, timeout_s: float) -> None:
    for actor_id, actor in _actors(status).items():
        if actor.state in _HOPELESS_AFTER_S and waited_s >= _HOPELESS_AFTER_S[actor.state]:
            raise RuntimeFailure(f"{actor_id} {actor.state}: {actor.detail}")
    if waited_s >= timeout_s:
        waiting = [f"{name} ({actor.state})" for name, actor in _actors(status).items() if actor.state != "ready"]
        raise RuntimeFailure(f"not ready after {timeout_s:g} s: {', '.join(waiting) or status.state}")
