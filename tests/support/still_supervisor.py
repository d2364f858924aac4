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
    """Four experts are ready; `loading` is an expert of which a copy is under way, for `copy_s`; `copied` are all with
    copies. There is room for so many at a time.
    """

    def __init__(self, copy_s: float = 0.0, room: int = 2) -> None:
        self._copy_s, self._room = copy_s, room
        self._copies: dict[str, tuple[int, float]] = {}
        self.made: list[int] = []

    @property
    def loading(self) -> int | None:
        """The expert of which a copy is under way."""
        return next((expert for expert, due_s in self._copies.values() if time.monotonic() < due_s), None)

    @property
    def copied(self) -> list[int]:
        """Experts, once for each copy that is ready."""
        return [expert for expert, due_s in self._copies.values() if time.monotonic() >= due_s]

    def status(self) -> ClusterStatus:
        rows = [(f"e{expert}", [expert], os.getpid(), "ready") for expert in range(4)]
        for name, (expert, due_s) in self._copies.items():
            rows.append((name, [expert], os.getpid(), "ready" if time.monotonic() >= due_s else "loading"))
        return status_of(*rows)

    def replicate(self, expert: int, first: int | None, last: int | None, node: str | None) -> dict[str, Any]:
        if len(self._copies) >= self._room:
            raise MoveRefused("every node is full")
        assert (first, last, node) == (None, None, None)
        assert self.loading is None, "one after another"
        name = f"e{expert}-copy-{len(self.made)}"
        self._copies[name] = expert, time.monotonic() + self._copy_s
        self.made.append(expert)
        return {"replica_id": name, "node_id": "n"}

    def drain_replica(self, replica_id: str) -> dict[str, Any]:
        assert self.loading is None, "a copy is measured until it is ready"
        del self._copies[replica_id]
        return {"replica_id": replica_id}
