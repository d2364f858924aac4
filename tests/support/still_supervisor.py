"""A supervisor of experts that stay as they are, but for copies that are counted and not made."""

import os
import time
from typing import Any

from actors.supervision.status import ClusterStatus, LoadStatus, ReplicaStatus
from cluster.desired_set import MoveRefused


def status_of(*replicas: tuple[str, list[int], int, str]) -> ClusterStatus:
    """Id, experts, process and state of each replica."""
    return ClusterStatus(
        state="ready",
        model="m",
        model_path="m",
        map_epoch=1,
        system_fingerprint="",
        uptime_s=0.0,
        coordinators=[],
        replicas=[ReplicaStatus(replica_id=i, expert_ids=e, pid=p, state=s) for i, e, p, s in replicas],
        load=LoadStatus(tokens_per_expert=[], window_tokens_per_expert=[], balancedness_per_layer=[], balancedness=1.0),
        events=[],
    )


class StillSupervisor:
    """Four experts are ready; `loading` is an expert of which a copy is under way, for `copy_s`."""

    def __init__(self, copy_s: float = 0.0, room: int = 2) -> None:
        self._copy_s, self._room = copy_s, room
        self._copy: tuple[str, int, float] | None = None
        self.made: list[int] = []

    @property
    def loading(self) -> int | None:
        """The expert of which a copy is under way."""
        return self._copy[1] if self._copy is not None and time.monotonic() < self._copy[2] else None

    def status(self) -> ClusterStatus:
        rows = [(f"e{expert}", [expert], os.getpid(), "ready") for expert in range(4)]
        if self._copy is not None:
            name, expert, _ = self._copy
            rows.append((name, [expert], os.getpid(), "ready" if self.loading is None else "loading"))
        return status_of(*rows)

    def replicate(self, expert: int, first: int | None, last: int | None, node: str | None) -> dict[str, Any]:
        if self._room == 0:
            raise MoveRefused("every node is full")
        assert (first, last, node) == (None, None, None)
        assert self._copy is None, "one after another"
        self._copy = f"e{expert}-copy", expert, time.monotonic() + self._copy_s
        self.made.append(expert)
        return {"replica_id": self._copy[0], "node_id": "n"}

    def drain_replica(self, replica_id: str) -> dict[str, Any]:
        assert self._copy is not None
        assert replica_id == self._copy[0]
        assert self.loading is None, "a copy is measured until it is ready"
        self._copy = None
        return {"replica_id": replica_id}
