"""The supervisor as others see it, for callers without an event loop. Light to import: no torch, no model."""

import contextlib
from typing import Any

from actors import ray_runtime
from actors.ray_runtime import ActorLost, RuntimeFailure
from actors.supervision.runtime import Actor, Runtime
from actors.supervision.status import ClusterStatus

SUPERVISOR_NAME = "supervisor"
CALL_TIMEOUT_S = 120.0  # the first call waits for the process to start
BALANCE_TIMEOUT_S = 3600.0  # a round of balancing loads weights
STOP_TIMEOUT_S = 30.0
AWAY = "the supervisor is away; what serves goes on, and Ray starts it again: ask once more in a few seconds"


class SupervisorClient:
    """The supervisor, for callers without an event loop."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def status(self) -> ClusterStatus:
        """Raises RuntimeFailure, in words for a person, while the supervisor is away."""
        return ClusterStatus.from_dict(self._ask("status"))

    def window(self) -> tuple[ClusterStatus, list[dict[str, Any]]]:
        """The status, and what each coordinator says of itself. Raises RuntimeFailure while the supervisor is away."""
        status, coordinators = self._ask("window")
        return ClusterStatus.from_dict(status), coordinators

    def balance(self, *, dry_run: bool) -> dict[str, Any]:
        """The policy's moves now, and what they are for; without `dry_run` they are made. See
        `actors.supervision.verbs`, for the others, too. Each raises RuntimeFailure, or MoveRefused.
        """
        return dict(self._ask("balance", dry_run, timeout_s=CALL_TIMEOUT_S if dry_run else BALANCE_TIMEOUT_S))

    def switch_balance(self, mode: str) -> None:
        """Balancing is off, dry_run or on from now on."""
        self._ask("switch_balance", mode)

    def replicate(self, expert: int, first: int | None, last: int | None, node: str | None) -> dict[str, Any]:
        """Begins to make one more replica of the expert; returns its `replica_id` and `node_id`."""
        return dict(self._ask("replicate", expert, first, last, node))

    def drain_replica(self, replica_id: str) -> dict[str, Any]:
        """Begins to end one replica."""
        return dict(self._ask("drain_replica", replica_id))

    def fold(self, num_groups: int) -> dict[str, Any]:
        """Begins to put all experts into so many processes; returns who is `made` and who is `gone`."""
        return dict(self._ask("fold", num_groups))

    def drain_node(self, node_id: str, drain_s: float) -> list[str]:
        """Moves what runs on that node; names of what is there still after `drain_s` seconds. Raises MoveRefused."""
        return list(self._ask("drain_node", node_id, drain_s, timeout_s=drain_s + STOP_TIMEOUT_S))

    def drain(self, drain_s: float) -> None:
        """Nothing new is taken; what is in flight gets up to `drain_s` seconds."""
        with contextlib.suppress(RuntimeFailure, TimeoutError):  # gone already: then there is nothing to drain
            self._actor.call_sync("drain", drain_s, timeout_s=drain_s + STOP_TIMEOUT_S)

    def retire(self) -> None:
        """Ends every process of the cluster, then the supervisor's own."""
        with contextlib.suppress(RuntimeFailure, TimeoutError):  # its processes then end with Ray
            self._actor.call_sync("retire", timeout_s=STOP_TIMEOUT_S)
        self._actor.kill()

    def _ask(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        try:
            return self._actor.call_sync(method, *args, timeout_s=timeout_s)
        except (ActorLost, TimeoutError) as error:
            raise RuntimeFailure(f"{AWAY} ({error})") from None


def find_supervisor(namespace: str, runtime: Runtime = ray_runtime) -> SupervisorClient | None:
    """The running supervisor of that namespace, or None."""
    actor = runtime.find(SUPERVISOR_NAME, namespace)
    return None if actor is None else SupervisorClient(actor)
