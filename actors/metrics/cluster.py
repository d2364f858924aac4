"""What the supervisor knows of the whole cluster, as metrics: processes by state, copies of experts, balancing."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from actors.metrics.family import MAX_EXPERT_SERIES, Family, LabelValues
from actors.metrics.increments import Increments
from actors.supervision.status import ClusterStatus, CopiesStatus

CLUSTER_STATES = ("starting", "ready", "degraded", "draining")
PROCESS_STATES = (
    "ready",
    "loading",
    "starting",
    "waiting",
    "draining",
    "unplaced",
    "refused",
    "failed",
    "dead",
    "other",
)
BALANCE_MODES = ("off", "dry_run", "on")


class ClusterMetrics:
    """Used by one exporter, which looks again and again."""

    def __init__(self) -> None:
        self._canaries = Increments()

    def families(self, status: ClusterStatus | None) -> Iterator[Family]:
        """All families; without a status they have no samples."""
        state = None if status is None else status.state
        yield _states("octavo_cluster_state", "1 for the state that the cluster is in", [state], CLUSTER_STATES)
        yield _states("octavo_coordinators", "Coordinator processes by state", _of(status, "coordinators"))
        yield _states("octavo_replicas", "Expert processes by state", _of(status, "replicas"))
        yield from _copies(() if status is None else status.copies)
        yield self._checks(status)
        yield from _balancing(None if status is None else getattr(status, "balance", None))

    def _checks(self, status: ClusterStatus | None) -> Family:
        replicas = () if status is None else status.replicas
        self._canaries.since_last({(one.replica_id, one.pid): float(one.canaries_total) for one in replicas})
        samples: dict[LabelValues, float] = {} if status is None else {(): self._canaries.total}
        text = "Checks of known rows against known answers that expert processes made, seen since this exporter started"
        return Family("octavo_canaries", "counter", text, (), samples)


def _of(status: ClusterStatus | None, rows: str) -> list[str | None]:
    return [None] if status is None else [row.state for row in getattr(status, rows)]


def _states(name: str, text: str, found: Sequence[str | None], known: tuple[str, ...] = PROCESS_STATES) -> Family:
    """How many are in each state; one that is not known counts as `other`, where there is that."""
    samples: dict[LabelValues, float] = {}
    if None not in found:
        named = [state if state in known else "other" for state in found]
        samples = {(state,): float(named.count(state)) for state in known}
    return Family(name, "gauge", text, ("state",), samples)


def _copies(copies: Sequence[CopiesStatus]) -> Iterator[Family]:
    few = len(copies) <= MAX_EXPERT_SERIES
    ready: dict[LabelValues, float] = {}
    wanted: dict[LabelValues, float] = {}
    for one in copies:
        label = (str(one.expert_id) if few else "all",)
        ready[label] = ready.get(label, 0.0) + one.ready
        wanted[label] = wanted.get(label, 0.0) + one.wanted
    missing: dict[LabelValues, float] = (
        {(): float(sum(max(0, one.wanted - one.ready) for one in copies))} if copies else {}
    )
    yield Family("octavo_expert_copies_ready", "gauge", "Copies of an expert that serve", ("expert",), ready)
    yield Family(
        "octavo_expert_copies_wanted", "gauge", "Copies of an expert that there should be", ("expert",), wanted
    )
    yield Family("octavo_expert_copies_missing", "gauge", "Copies that there should be and are not", (), missing)


def _balancing(balance: Any) -> Iterator[Family]:
    """`balance` is ClusterStatus.balance, or None: then nothing is said of moves."""
    moves: dict[LabelValues, float] = {}
    mode: dict[LabelValues, float] = {}
    total: dict[LabelValues, float] = {}
    moved: dict[LabelValues, float] = {}
    if balance is not None:
        told = balance if isinstance(balance, dict) else dataclasses.asdict(balance)
        moves = {(name,): float(len(told.get(name) or ())) for name in ("proposed", "done", "failed")}
        mode = {(name,): float(told.get("mode") == name) for name in BALANCE_MODES}
        total = {(): float(told.get("moves_total", 0))}
        moved = {(): float(told.get("moved_bytes_total", 0))}
    yield Family("octavo_balance_mode", "gauge", "1 for the mode of balancing", ("mode",), mode)
    yield Family(
        "octavo_balance_moves", "gauge", "Balancing moves that are told of now, by outcome", ("outcome",), moves
    )
    yield Family("octavo_rebalances", "counter", "Balancing moves made", (), total)
    yield Family("octavo_rebalance_moved_bytes", "counter", "Bytes of weights that balancing moves loaded", (), moved)
