"""The dashboard's snapshot: what is known of a cluster at one moment, as one JSON object of bounded size.

`version` is 1; fields may be added, never renamed. Times are seconds, `at_s` since 1970; null means not known.

- `source`: ingress (then `front` is its own figures) or supervisor (then `front` is null).
- `cluster`: `state` (starting, ready, degraded, draining, unknown), `model`, `map_epoch`, `system_fingerprint`,
  `uptime_s`, `age_s` (of the supervisor's word), `coordinators_age_s`.
- `load`: tokens of the last `window_s` by layer and expert (`tokens`, empty above MAX_CELLS), `balancedness` by layer.
- `copies`: by expert, `ready` and `wanted`.
- `replicas`: one row each; `standing` is the worst that a coordinator says of it, `reasons` say why.
- `coordinators`: one row each; `kv_used` of `kv_total` blocks.
- `totals`: sums over coordinators, among them tokens a second.
- `balance`: `mode`, `policy`, sums, and the last moves (`proposed`, `done`, `failed`), the newest last.
- `epochs`: of the map, with when each was first seen by who looks. `events`: the supervisor's, the newest last.

What is left out for size is counted in `left_out`. A pure function: who looks is said in `actors.window.reading`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from actors.metrics.coordinators import sum_loads
from actors.metrics.family import Facts
from actors.supervision.status import BalanceStatus, ClusterStatus, CoordinatorStatus, ReplicaStatus
from actors.window.reading import History, Reading, life_of
from cluster.load import balancedness

VERSION = 1
MAX_CELLS = 16_384
MAX_EXPERTS = 1024
MAX_REPLICAS = 256
MAX_COORDINATORS = 64
MAX_EVENTS = 24
MAX_MOVES = 16
MAX_REASONS = 3
MAX_TEXT = 240

STANDINGS = ("healthy", "probing", "away", "ejected", "quarantined")
"""How a replica stands with a coordinator, the best first."""

Snapshot = dict[str, Any]
Source = Literal["ingress", "supervisor"]


def make_snapshot(reading: Reading, history: History, source: Source) -> Snapshot:
    """The snapshot of a reading; `history` has it as its last."""
    status = reading.status
    replicas = _replicas(status, reading.coordinators)
    coordinators = _coordinators(reading, history)
    shown_replicas, shown_coordinators = _shown(replicas, MAX_REPLICAS), _shown(coordinators, MAX_COORDINATORS)
    return {
        "version": VERSION,
        "source": source,
        "at_s": round(reading.at_s, 3),
        "cluster": _cluster(reading),
        "load": _load(reading.coordinators),
        "copies": [] if status is None else [dataclasses.asdict(one) for one in status.copies[:MAX_EXPERTS]],
        "replicas": shown_replicas,
        "coordinators": shown_coordinators,
        "totals": _totals(coordinators),
        "front": _front(reading, history),
        "balance": _balance(BalanceStatus() if status is None else status.balance),
        "epochs": [{"epoch": epoch, "at_s": round(at_s, 3)} for epoch, at_s in history.epochs],
        "events": [] if status is None else [_text(event) for event in status.events[-MAX_EVENTS:]],
        "left_out": {
            "replicas": len(replicas) - len(shown_replicas),
            "coordinators": len(coordinators) - len(shown_coordinators),
        },
    }


def _cluster(reading: Reading) -> dict[str, Any]:
    status = reading.status
    return {
        "state": "unknown" if status is None else status.state,
        "model": "" if status is None else _text(status.model),
        "map_epoch": reading.epoch,
        "system_fingerprint": "" if status is None else status.system_fingerprint,
        "uptime_s": None if status is None else status.uptime_s,
        "age_s": None if status is None else round(reading.status_age_s, 1),
        "coordinators_age_s": round(reading.coordinators_age_s, 1),
    }


def _load(coordinators: Sequence[Facts]) -> dict[str, Any]:
    load_LE = sum_loads([facts.get("window_load", ()) for facts in coordinators])
    num_layers, num_experts = load_LE.shape
    even_L = balancedness(load_LE) if load_LE.size else np.zeros(0)
    return {
        "window_s": round(max((float(facts.get("window_s", 0.0)) for facts in coordinators), default=0.0), 1),
        "num_layers": num_layers,
        "num_experts": num_experts,
        "tokens": load_LE.tolist() if load_LE.size <= MAX_CELLS else [],
        "balancedness": [round(float(even), 3) for even in even_L[:MAX_CELLS]],
        "mean_balancedness": round(float(even_L.mean()), 3) if load_LE.size else None,
    }


def _replicas(status: ClusterStatus | None, coordinators: Sequence[Facts]) -> list[dict[str, Any]]:
    """The supervisor's rows; without one, what coordinators know of those in their maps."""
    busy: dict[str, float] = {}
    said: dict[str, list[tuple[int, str]]] = {}
    for facts in coordinators:
        for one in facts.get("replica_times", ()):
            busy[one["replica_id"]] = busy.get(one["replica_id"], 0.0) + float(one["busy_share"])
        for one in facts.get("replica_health", ()):
            said.setdefault(one["replica_id"], []).append(_said(facts, one))
    if status is None:
        known = [ReplicaStatus(replica_id=name, state="unknown") for name in sorted(busy.keys() | said.keys())]
    else:
        known = status.replicas
    return [_replica(one, said.get(one.replica_id, ()), busy.get(one.replica_id)) for one in known]


def _said(facts: Facts, health: Mapping[str, Any]) -> tuple[int, str]:
    """(place in STANDINGS, why) of a replica, in a coordinator's words; one that is not known is as bad as any."""
    state, why = str(health["state"]), str(health["detail"])
    place = STANDINGS.index(state) if state in STANDINGS else len(STANDINGS) - 1
    return place, f"{facts['coordinator_id']}: {state}{', ' if why else ''}{why}"


def _replica(one: ReplicaStatus, said: Sequence[tuple[int, str]], busy_share: float | None) -> dict[str, Any]:
    worst = max((place for place, _ in said), default=None)
    reasons = [one.detail] if one.detail else []
    reasons += [text for place, text in sorted(said, reverse=True) if place > 0]
    first, last = one.layers or (None, None)
    return {
        "replica_id": one.replica_id,
        "expert_ids": one.expert_ids,
        "first_layer": first,
        "last_layer": last,
        "state": one.state,
        "standing": None if worst is None else STANDINGS[worst],
        "reasons": [_text(reason) for reason in reasons[:MAX_REASONS]],
        "node": one.node,
        "pid": one.pid,
        "address": one.address,
        "kernel": one.kernel,
        "weight_bytes": one.weight_bytes,
        "loaded_bytes": one.loaded_bytes,
        "num_inflight_tokens": one.inflight_tokens,
        "tokens_total": one.tokens_total,
        "busy_share": None if busy_share is None else round(busy_share, 3),
    }


def _coordinators(reading: Reading, history: History) -> list[dict[str, Any]]:
    """Those that answer, as they say themselves; others as the supervisor saw them last."""
    told = {str(facts["coordinator_id"]): facts for facts in reading.coordinators}
    seen = {} if reading.status is None else {one.coordinator_id: one for one in reading.status.coordinators}
    return [
        _coordinator(name, told.get(name) or _silent(seen[name]), history) for name in sorted(told.keys() | seen.keys())
    ]


def _silent(row: CoordinatorStatus) -> Facts:
    """One that does not answer who looks has no figures; it may be too early for the supervisor to know why."""
    state = "silent" if row.state == "ready" else row.state
    return {
        "coordinator_id": row.coordinator_id,
        "pid": row.pid,
        "node_id": row.node,
        "state": state,
        "detail": row.detail,
        "map_epoch": row.map_epoch,
    }


def _coordinator(name: str, facts: Facts, history: History) -> dict[str, Any]:
    total = int(facts.get("kv_blocks_total", 0))
    rate = history.tokens_per_s(life_of(facts))
    return {
        "coordinator_id": name,
        "state": str(facts.get("state", "")),
        "detail": _text(str(facts.get("detail", ""))),
        "node": str(facts.get("node_id", "")),
        "pid": int(facts.get("pid", 0)),
        "kernel": str(facts.get("kernel", "")),
        "map_epoch": int(facts.get("map_epoch", 0)),
        "num_running": int(facts.get("num_running", 0)),
        "num_waiting": int(facts.get("num_waiting", 0)),
        "queue_s": round(float(facts.get("queue_s", 0.0)), 2),
        "kv_used": total - int(facts.get("kv_blocks_free", 0)),
        "kv_total": total,
        "kv_block_size": int(facts.get("kv_block_size", 0)),
        "preemptions_total": int(facts.get("preemptions_total", 0)),
        "expert_retries_total": int(facts.get("expert_retries_total", 0)),
        "hedges_total": int(facts.get("hedges_total", 0)),
        "prompt_tokens_total": int(facts.get("prompt_tokens_total", 0)),
        "generated_tokens_total": int(facts.get("generated_tokens_total", 0)),
        "prompt_tokens_per_s": None if rate is None else round(rate[0], 2),
        "generated_tokens_per_s": None if rate is None else round(rate[1], 2),
    }


def _totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    summed = (
        *("num_running", "num_waiting", "kv_used", "kv_total", "preemptions_total", "expert_retries_total"),
        *("hedges_total", "prompt_tokens_total", "generated_tokens_total"),
    )
    totals: dict[str, Any] = {name: sum(row[name] for row in rows) for name in summed}
    for name in ("prompt_tokens_per_s", "generated_tokens_per_s"):
        known = [row[name] for row in rows if row[name] is not None]
        totals[name] = round(sum(known), 2) if known else None
    return totals | {"queue_s": max((row["queue_s"] for row in rows), default=0.0)}


def _front(reading: Reading, history: History) -> dict[str, Any] | None:
    observed = history.observed()
    if reading.front is None or observed is None:
        return None
    told: dict[str, Any] = {"num_inflight": reading.front.num_inflight}
    for name, buckets in zip(("ttft", "itl"), observed, strict=True):
        found = {share: buckets.quantile(share) for share in (0.5, 0.99)}
        told[name] = {"count": buckets.total} | {
            f"p{share * 100:.0f}_s": None if value is None else round(value, 4) for share, value in found.items()
        }
    return told


def _balance(balance: BalanceStatus) -> dict[str, Any]:
    return {
        "mode": balance.mode,
        "policy": _text(balance.policy),
        "moves_total": balance.moves_total,
        "moved_bytes_total": balance.moved_bytes_total,
        **{name: _moves(getattr(balance, name)) for name in ("proposed", "done", "failed")},
    }


def _moves(moves: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: _text(value) if isinstance(value, str) else value for name, value in move.items()}
        for move in moves[-MAX_MOVES:]
    ]


def _shown(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """All rows in their order; of too many, those that are not ready before others."""
    if len(rows) <= most:
        return rows
    ranked = sorted(range(len(rows)), key=lambda place: (rows[place]["state"] == "ready", place))
    return [rows[place] for place in sorted(ranked[:most])]


def _text(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
