"""What a supervisor says of a small cluster, for those who show it."""

from collections.abc import Mapping
from typing import Any

from actors.supervision.status import ClusterStatus, CoordinatorStatus, CopiesStatus, LoadStatus, ReplicaStatus


def status(num_experts: int = 2, **changes: Any) -> ClusterStatus:
    """Two replicas of each expert wanted, one there."""
    parts: dict[str, Any] = {
        "state": "degraded",
        "model": "tiny",
        "model_path": "/tiny",
        "map_epoch": 3,
        "system_fingerprint": "fp",
        "uptime_s": 1.0,
        "coordinators": [CoordinatorStatus(coordinator_id="coordinator-0", state="ready")],
        "replicas": [
            ReplicaStatus(replica_id=f"expert-{expert}-r0", state="ready", pid=expert, canaries_total=5)
            for expert in range(num_experts)
        ],
        "load": LoadStatus(
            tokens_per_expert=[], window_tokens_per_expert=[], balancedness_per_layer=[], balancedness=1.0
        ),
        "events": [],
        "copies": [CopiesStatus(expert_id=e, ready=1, wanted=2) for e in range(num_experts)],
    }
    return ClusterStatus(**{**parts, **changes})


class Balanced(ClusterStatus):
    """A status with word of balancing, in the form that the supervisor gives it."""

    balance: Mapping[str, Any]


def balanced(**balance: Any) -> ClusterStatus:
    """`status`, with these fields of `balance`."""
    one = Balanced(**{name: getattr(status(), name) for name in ClusterStatus.__slots__})
    object.__setattr__(one, "balance", balance)
    return one
