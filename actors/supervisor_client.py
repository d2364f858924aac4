"""The supervisor as others see it, for callers without an event loop. Light to import: no torch, no model."""

from actors import ray_runtime
from actors.ray_runtime import ActorRef, RuntimeFailure
from actors.status import ClusterStatus

SUPERVISOR_NAME = "supervisor"
CALL_TIMEOUT_S = 120.0  # the first call waits for the process to start


class SupervisorClient:
    """The supervisor, for callers without an event loop."""

    def __init__(self, actor: ActorRef) -> None:
        self._actor = actor

    def status(self) -> ClusterStatus:
        """Raises RuntimeFailure when the supervisor is gone."""
        return ClusterStatus.from_dict(self._actor.call_sync("status", timeout_s=CALL_TIMEOUT_S))

    def retire(self, drain_timeout_s: float) -> None:
        """Drains coordinators and experts, ends their processes, then the supervisor's."""
        try:
            self._actor.call_sync("retire", drain_timeout_s, timeout_s=drain_timeout_s + CALL_TIMEOUT_S)
        except (RuntimeFailure, TimeoutError):
            pass  # its actors end with the cluster, or are found again by name
        finally:
            self._actor.kill()


def find_supervisor(namespace: str) -> SupervisorClient | None:
    """The running supervisor of that namespace, or None."""
    actor = ray_runtime.find(SUPERVISOR_NAME, namespace)
    return None if actor is None else SupervisorClient(actor)
