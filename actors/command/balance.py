"""`octavo balance` and `octavo experts`: asks the supervisor, waits where wanted, and shows what came of it."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape

from actors.command.status import with_supervisor
from actors.ray_runtime import RuntimeFailure
from actors.supervision.client import SupervisorClient
from actors.supervision.status import ClusterStatus, plain_table, replica_table, size
from cluster.config import ConfigError

POLL_S = 0.5
WAIT_S = 1800.0
MODES = ("off", "dry_run", "on")


def ask_to_balance(address: str | None, namespace: str, *, dry_run: bool, as_json: bool, console: Console) -> None:
    """Prints the policy's moves; without `dry_run` they have been made by then. Raises RuntimeFailure."""
    found = with_supervisor(address, namespace, lambda supervisor: supervisor.balance(dry_run=dry_run))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        console.print(moves_table(found, dry_run=dry_run))
    for move in found["failed"]:
        raise RuntimeFailure(f"{move['kind']} {move['what']} failed: {move['error']}")


def switch(address: str | None, namespace: str, mode: str) -> None:
    """Switches the loop. Raises ConfigError for a mode that there is not."""
    if mode not in MODES:
        raise ConfigError(f"mode is {mode!r}, but must be one of {', '.join(MODES)}")
    with_supervisor(address, namespace, lambda supervisor: supervisor.switch_balance(mode))


def list_experts(address: str | None, namespace: str, console: Console) -> None:
    """Prints every replica."""
    console.print(replica_table(with_supervisor(address, namespace, lambda supervisor: supervisor.status())))


def replicate_expert(
    address: str | None,
    namespace: str,
    expert: int,
    layers: str | None,
    node: str | None,
    *,
    wait: bool,
    console: Console,
) -> None:
    """Makes one more replica. Raises ConfigError for layers of another form, MoveRefused, RuntimeFailure."""
    first, last = (None, None) if layers is None else _layers(layers)

    def ask(supervisor: SupervisorClient) -> None:
        made = supervisor.replicate(expert, first, last, node)
        console.print(f"{made['replica_id']} is made on node {made['node_id']}", markup=False)
        if wait:
            _wait(supervisor, lambda status: _all_ready(status, {made["replica_id"]}), made["replica_id"])

    with_supervisor(address, namespace, ask)


def drain_replica(address: str | None, namespace: str, replica_id: str, *, wait: bool, console: Console) -> None:
    """Ends a replica. Raises MoveRefused, RuntimeFailure."""

    def ask(supervisor: SupervisorClient) -> None:
        supervisor.drain_replica(replica_id)
        console.print(f"{replica_id} answers what it has, and ends", markup=False)
        if wait:
            _wait(supervisor, lambda status: _all_gone(status, {replica_id}), replica_id)

    with_supervisor(address, namespace, ask)


def fold_experts(address: str | None, namespace: str, num_groups: int, *, wait: bool, console: Console) -> None:
    """Puts all experts into so many processes. Raises MoveRefused, RuntimeFailure."""

    def ask(supervisor: SupervisorClient) -> None:
        folded = supervisor.fold(num_groups)
        made, gone = set(folded["made"]), set(folded["gone"])
        console.print(f"{len(made)} replicas are made, {len(gone)} go when those serve", markup=False)
        if wait:
            _wait(supervisor, lambda status: _all_ready(status, made) or _all_gone(status, gone), f"{num_groups}")

    with_supervisor(address, namespace, ask)


def moves_table(found: Mapping[str, Any], *, dry_run: bool) -> RenderableType:
    """What the policy wants or wanted, and what that is for."""
    table = plain_table("moves that balancing would make" if dry_run else "moves", *_COLUMNS)
    for move in found["moves"]:
        table.add_row(
            move["kind"],
            move["what"],
            str(move["node_id"])[:8],
            str(move["source"])[:8] or ("disk" if move["kind"] == "copy" else ""),
            size(move["num_bytes"]) if move["num_bytes"] else "",
            escape(move["reason"]),
        )
    even = f"balancedness {found['balancedness_before']:.2f} -> {found['balancedness_after']:.2f}"
    share = f"busiest hosts {found['busiest_share_before']:.1%} -> {found['busiest_share_after']:.1%} of the time"
    return Group(table, "", f"{even}, {share}, {size(found['moved_bytes'])} to load")


_COLUMNS = ("kind", "what", "node", "from", "bytes", "reason")


def _layers(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
        raise ConfigError(f"layers is {text!r}, but must be a first and a last layer, as 0-15")
    return int(first), int(last or first)


def _wait(supervisor: SupervisorClient, trouble: Callable[[ClusterStatus], str | None], what: str) -> None:
    """Returns when there is nothing to wait for any more. Raises RuntimeFailure."""
    deadline_s = time.monotonic() + WAIT_S
    why: str | None = ""
    while time.monotonic() < deadline_s:
        why = trouble(supervisor.status())
        if why is None:
            return
        time.sleep(POLL_S)
    raise RuntimeFailure(f"{what} was not done within {WAIT_S:g} s: {why}")


def _all_ready(status: ClusterStatus, replica_ids: set[str]) -> str | None:
    """What still lacks. Raises RuntimeFailure for a replica that cannot be."""
    rows = {one.replica_id: one for one in status.replicas if one.replica_id in replica_ids}
    for replica_id in sorted(replica_ids):
        if replica_id not in rows:
            raise RuntimeFailure(f"{replica_id} is not wanted any more: somebody else has changed what is")
        row = rows[replica_id]
        if row.state in ("failed", "unplaced", "refused"):
            raise RuntimeFailure(f"{replica_id} is {row.state}: {row.detail}")
        if row.state != "ready":
            return f"{replica_id} is {row.state}"
    epochs = [one.map_epoch for one in status.coordinators]
    return None if all(epoch == status.map_epoch for epoch in epochs) else "a coordinator has an older map"


def _all_gone(status: ClusterStatus, replica_ids: set[str]) -> str | None:
    left = sorted(one.replica_id for one in status.replicas if one.replica_id in replica_ids)
    return f"{left[0]} is still there" if left else None
