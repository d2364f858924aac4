"""The supervisor as others see it, for callers without an event loop. Light to import: no torch, no model."""

import contextlib

from actors import ray_runtime
from actors.ray_runtime import RuntimeFailure
from actors.supervision.runtime import Actor, Runtime
from actors.supervision.status import ClusterStatus

SUPERVISOR_NAME = "supervisor"
CALL_TIMEOUT_S = 120.0  # the first call waits for the process to start
STOP_TIMEOUT_S = 30.0


class SupervisorClient:
    """The supervisor, for callers without an event loop."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def status(self) -> ClusterStatus:
        """Raises RuntimeFailure when the supervisor is gone."""
        return ClusterStatus.from_dict(self._actor.call_sync("status", timeout_s=CALL_TIMEOUT_S))

    def drain(self, drain_s: float) -> None:
        """Nothing new is taken; what is in flight gets up to `drain_s` seconds."""
        with contextlib.suppress(RuntimeFailure, TimeoutError):  # gone already: then there is nothing to drain
            self._actor.call_sync("drain", drain_s, timeout_s=drain_s + STOP_TIMEOUT_S)

    def retire(self) -> None:
        """Ends every process of the cluster, then the supervisor's own."""
        with contextlib.suppress(RuntimeFailure, TimeoutError):  # its processes then end with Ray
            self._actor.call_sync("retire", timeout_s=STOP_TIMEOUT_S)
        self._actor.kill()


def find_supervisor(namespace: str, runtime: Runtime = ray_runtime) -> SupervisorClient | None:
    """The running supervisor of that namespace, or None."""
    actor = runtime.find(SUPERVISOR_NAME, namespace)
    return None if actor is None else SupervisorClient(actor)
