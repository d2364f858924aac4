"""Makes a `ClusterStatus` of what the supervisor has seen: a pure function of views, records and the blueprint."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from actors.code_version import code_version
from actors.supervision.blueprint import Blueprint
from actors.supervision.keepers import ExpertKeeper
from actors.supervision.member import View
from actors.supervision.status import (
    BalanceStatus,
    ClusterStatus,
    CoordinatorStatus,
    CopiesStatus,
    LoadStatus,
    ReplicaStatus,
)
from cluster.desired import DesiredReplica
from cluster.ids import CoordinatorId, ReplicaId
from cluster.load import balancedness


def report(
    blueprint: Blueprint,
    experts: ExpertKeeper,
    coordinators: Mapping[str, View],
    failed: Mapping[str, str],
    *,
    wanted: Sequence[CoordinatorId],
    was_ready: bool,
    uptime_s: float,
    draining: bool,
    events: Sequence[str],
    balance: BalanceStatus | None = None,
) -> ClusterStatus:
    """`failed` names processes that fail again and again, and why; `was_ready` says that all was there once.

    `wanted` are the coordinators that there should be; others are shown while they finish what they have.
    """
    state = experts.state
    replica_rows = [
        _replica(one, experts.views.get(one.replica_id), failed, experts.unplaced, state.refused)
        for one in (*experts.wanted, *experts.former.values())
    ]
    coordinator_rows = [_coordinator(one, coordinators.get(one), failed) for one in wanted]
    ending = [name for name, view in coordinators.items() if name not in wanted and view.dead is None and view.info]
    needed = {one.replica_id for one in experts.wanted if not experts.is_spare(one)}
    states = {row.state for row in replica_rows if row.replica_id in needed} | {row.state for row in coordinator_rows}
    whole = not state.expert_map.missing()
    current = all(row.map_epoch == state.expert_map.epoch for row in coordinator_rows)
    if draining:
        overall = "draining"
    elif whole and current and states == {"ready"}:
        overall = "ready"
    elif (whole or was_ready) and any(row.state == "ready" for row in coordinator_rows):
        overall = "degraded"
    else:
        overall = "starting"
    path = Path(blueprint.config.model)
    return ClusterStatus(
        state=overall,
        model=blueprint.config.served_model_name or path.resolve().name,
        model_path=str(path.resolve()),
        map_epoch=state.expert_map.epoch,
        system_fingerprint=fingerprint(blueprint, experts.views, coordinators),
        uptime_s=round(uptime_s, 1),
        coordinators=[*coordinator_rows, *(_coordinator(one, coordinators[one], failed) for one in ending)],
        replicas=replica_rows,
        load=_load(blueprint, coordinators),
        events=list(events),
        copies=[
            CopiesStatus(expert_id=int(expert), ready=copies.ready, wanted=copies.wanted)
            for expert, copies in experts.redundancy.copies.items()
        ],
        balance=balance or BalanceStatus(),
    )


def fingerprint(blueprint: Blueprint, experts: Mapping[str, View], coordinators: Mapping[str, View]) -> str:
    """A hash of the weights' checksums, the code and every numerics domain: equal ones give equal tokens.

    A process that still loads has no domain yet, and changes nothing.
    """
    domains = {
        str(view.info["numerics_domain"])
        for view in (*experts.values(), *coordinators.values())
        if view.info is not None and view.info["numerics_domain"]
    }
    text = "\n".join([blueprint.checkpoint.content_id, code_version(), *sorted(domains)])
    return f"fp_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _state(view: View | None, failed: Mapping[str, str], name: str) -> tuple[str, str]:
    """(state, detail) of one process as people read it."""
    if name in failed:
        return "failed", failed[name]
    if view is None:
        return "waiting", ""
    return view.state, view.detail


def _known(row: type[ReplicaStatus] | type[CoordinatorStatus], info: Mapping[str, Any]) -> dict[str, Any]:
    """What a process's own account says of the row's fields."""
    return {field.name: info[field.name] for field in fields(row) if field.name in info}


def _replica(
    replica: DesiredReplica,
    view: View | None,
    failed: Mapping[str, str],
    unplaced: Mapping[ReplicaId, str],
    refused: Mapping[ReplicaId, str],
) -> ReplicaStatus:
    state, detail = _state(view, failed, replica.replica_id)
    if replica.replica_id in unplaced:
        state, detail = "unplaced", unplaced[replica.replica_id]
    elif state == "ready" and replica.replica_id in refused:
        state, detail = "refused", refused[replica.replica_id]
    info = {} if view is None or view.info is None else view.info
    known = _known(ReplicaStatus, info) | {
        "replica_id": replica.replica_id,
        "expert_ids": [int(expert) for expert in replica.expert_ids],
        "layers": [int(replica.first_layer), replica.first_layer + replica.num_layers - 1],
        "node": str(info.get("node_id") or (view is not None and view.node_id) or ""),
        "loaded_bytes": int(info.get("bytes_loaded", 0)),
        "weight_bytes": int(info.get("weight_bytes") or info.get("bytes_total", 0)),
        "state": state,
        "detail": detail,
    }
    return ReplicaStatus(**known)


def _coordinator(coordinator_id: str, view: View | None, failed: Mapping[str, str]) -> CoordinatorStatus:
    state, detail = _state(view, failed, coordinator_id)
    info = {} if view is None or view.info is None else view.info
    known = _known(CoordinatorStatus, info) | {
        "coordinator_id": coordinator_id,
        "weight_bytes": int(info.get("weight_bytes") or info.get("bytes_total", 0)),
        "state": state,
        "detail": detail,
    }
    return CoordinatorStatus(**known)


def _load(blueprint: Blueprint, coordinators: Mapping[str, View]) -> LoadStatus:
    shape = (blueprint.checkpoint.config.num_layers, blueprint.checkpoint.config.num_experts)
    total_LE, window_LE = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for view in coordinators.values():
        if view.info is not None and view.info.get("load"):
            total_LE += np.asarray(view.info["load"], dtype=np.int64)
            window_LE += np.asarray(view.info["window_load"], dtype=np.int64)
    per_layer = [round(float(value), 4) for value in balancedness(total_LE)]
    return LoadStatus(
        tokens_per_expert=[int(value) for value in total_LE.sum(axis=0)],
        window_tokens_per_expert=[int(value) for value in window_LE.sum(axis=0)],
        balancedness_per_layer=per_layer,
        balancedness=round(sum(per_layer) / len(per_layer), 4),
    )
