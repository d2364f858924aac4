"""What the cluster looks like right now, as values: the stable JSON of `octavo status --json`, and its tables.

Field names are an interface that scripts rely on: add, never rename. Gathering the values is the supervisor's work.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

SHOWN_EVENTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One expert replica. `layers` is [first, last]; weights in bytes; `load_s` seconds spent loading them.

    A process that has not spoken yet has zeros and empty texts."""

    replica_id: str
    expert_ids: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    pid: int = 0
    node: str = ""
    address: str = ""
    state: str = ""
    inflight_tokens: int = 0
    tokens_total: int = 0
    canaries_total: int = 0
    kernel: str = ""
    weight_bytes: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorStatus:
    """One coordinator: its queue, its KV blocks, and the map it uses."""

    coordinator_id: str
    pid: int = 0
    node: str = ""
    address: str = ""
    state: str = ""
    map_epoch: int = 0
    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    kv_block_size: int = 0
    max_model_len: int = 0
    kernel: str = ""
    weight_bytes: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    preemptions_total: int = 0
    prefix_queries_tokens_total: int = 0
    prefix_hits_tokens_total: int = 0
    kv_blocks_cached: int = 0
    expert_retries_total: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStatus:
    """Tokens routed to each expert, summed over layers, and each layer's balancedness (mean / max, 1.0 is even)."""

    tokens_per_expert: list[int]
    window_tokens_per_expert: list[int]
    balancedness_per_layer: list[float]
    balancedness: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiesStatus:
    """Copies of one expert: in the map, and wanted."""

    expert_id: int
    ready: int
    wanted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceStatus:
    """What balancing wants to do, and has done lately, the newest last.

    A move is a dict with `kind` (copy, drop, add_hosts, drain_host, keep_host, remove_host), `what`, `node_id`,
    `source`, `num_bytes`, `reason`, `at` (seconds since 1970), and `error` where it failed. `mode` is off, dry_run
    or on.
    """

    mode: str = "off"
    policy: str = ""
    proposed: list[dict[str, Any]] = field(default_factory=list)
    done: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    moves_total: int = 0
    moved_bytes_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """The whole cluster. `state` is starting, ready, degraded or draining.

    A cluster that serves is degraded exactly while something that should be there is not."""

    state: str
    model: str
    model_path: str
    map_epoch: int
    system_fingerprint: str
    uptime_s: float
    coordinators: list[CoordinatorStatus]
    replicas: list[ReplicaStatus]
    load: LoadStatus
    events: list[str]
    copies: list[CopiesStatus] = field(default_factory=list)
    balance: BalanceStatus = field(default_factory=BalanceStatus)

    def to_json(self) -> str:
        """The stable JSON text, one object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "ClusterStatus":
        """The inverse of `dataclasses.asdict`."""
        parts = {
            "coordinators": [CoordinatorStatus(**one) for one in value["coordinators"]],
            "replicas": [ReplicaStatus(**one) for one in value["replicas"]],
            "load": LoadStatus(**value["load"]),
            "copies": [CopiesStatus(**one) for one in value.get("copies", ())],
            "balance": BalanceStatus(**value.get("balance", {})),
        }
        return cls(**{**value, **parts})


def render(status: ClusterStatus) -> RenderableType:
    """The human form of a status: a summary, three tables and the last events."""
    summary = (
        f"[bold]{escape(status.model)}[/bold]: {status.state}, map epoch {status.map_epoch}, "
        f"balancedness {status.load.balancedness:.2f}, up {status.uptime_s:.0f} s"
    )
    lacking = [
        f"expert {one.expert_id} has {one.ready} of {one.wanted}" for one in status.copies if one.ready < one.wanted
    ]
    if lacking:
        summary += f"\ncopies: {', '.join(lacking)}"
    events = "\n".join(escape(event) for event in status.events[-SHOWN_EVENTS:])
    if status.balance.mode != "off":
        summary += f"\nbalancing: {escape(_balance(status.balance))}"
    return Group(summary, "", _coordinators(status), "", replica_table(status), "", _load(status), "", events)


def _balance(balance: BalanceStatus) -> str:
    parts = [f"{balance.mode.replace('_', ' ')}, policy {balance.policy}", f"{balance.moves_total} moves"]
    parts.append(f"{size(balance.moved_bytes_total)} loaded")
    if balance.proposed:
        parts.append(f"{len(balance.proposed)} proposed")
    if balance.failed:
        parts.append(f"last failure: {balance.failed[-1]['error']}")
    return ", ".join(parts)


def size(num_bytes: int) -> str:
    """A byte count for people, in KiB, MiB or GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes / 2**10:.3g} KiB"


def plain_table(title: str, *columns: str) -> Table:
    """A table that survives 80 columns and copying: no frame, no folded cells."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _coordinators(status: ClusterStatus) -> Table:
    table = plain_table(
        "coordinators",
        "id",
        "state",
        "pid",
        "node",
        "address",
        "epoch",
        "running",
        "waiting",
        "KV free",
        "cached",
        "kernel",
    )
    for one in status.coordinators:
        table.add_row(
            one.coordinator_id,
            one.state,
            str(one.pid),
            one.node[:8],
            escape(one.address),
            str(one.map_epoch),
            str(one.num_running),
            str(one.num_waiting),
            f"{one.kv_blocks_free}/{one.kv_blocks_total} x {one.kv_block_size}",
            _hit_share(one),
            one.kernel,
        )
    return table


def _hit_share(one: CoordinatorStatus) -> str:
    """Of the tokens that requests came with, those that were in the KV cache already."""
    queries = one.prefix_queries_tokens_total
    return f"{one.prefix_hits_tokens_total / queries:.0%}" if queries else "-"


def replica_table(status: ClusterStatus) -> Table:
    """Every expert replica, one a line."""
    table = plain_table(
        "expert replicas",
        *("id", "experts", "layers", "state", "pid", "node", "address", "in flight", "kernel", "weights"),
    )
    for one in status.replicas:
        table.add_row(
            one.replica_id,
            ",".join(map(str, one.expert_ids)),
            f"{one.layers[0]}-{one.layers[1]}",
            one.state,
            str(one.pid),
            one.node[:8],
            escape(one.address),
            str(one.inflight_tokens),
            one.kernel,
            size(one.weight_bytes),
        )
    return table


def _load(status: ClusterStatus) -> Table:
    load = status.load
    table = plain_table("expert load, tokens over all layers", "expert", *map(str, range(len(load.tokens_per_expert))))
    table.add_row("since start", *map(str, load.tokens_per_expert))
    table.add_row("recent window", *map(str, load.window_tokens_per_expert))
    return table
