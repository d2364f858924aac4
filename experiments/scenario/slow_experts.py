"""Experts that are slow by decree, so that they are the bottleneck and Ray nodes are hosts on a machine with few cores.

Every row costs so much more, asleep; where a node is one device its experts wait for each other. Only scenarios that
ask for it (`live.row_us`) get such experts: no configuration of a cluster leads here.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from actors import ray_runtime
from actors.expert.process import ExpertProcess
from actors.supervision.runtime import Runtime
from actors.supervision.supervisor import Supervisor
from cluster.config import ClusterConfig
from experiments.scenario.slow_process import LOCKS, ROW_US, SlowProcess


@contextmanager
def runtime_for(row_us: float, *, own_devices: bool) -> Iterator[Runtime]:
    """Ray as it is, or with experts that take `row_us` microseconds more for each row."""
    if row_us <= 0:
        yield ray_runtime
        return
    if own_devices:
        yield SlowRuntime(row_us, "")
        return
    with tempfile.TemporaryDirectory(prefix="octavo-experiment-") as locks:
        yield SlowRuntime(row_us, locks)


class SlowRuntime:
    """Ray, but for the classes of the supervisor and the experts. `locks` may be a directory for a file a node."""

    def __init__(self, row_us: float, locks: str) -> None:
        self._row_us, self._locks = row_us, locks

    def __getattr__(self, name: str) -> Any:
        return getattr(ray_runtime, name)

    def spawn(self, actor_class: type, **options: Any) -> Any:
        """See `actors.ray_runtime.spawn`."""
        if actor_class is Supervisor:
            told = {"row_us": self._row_us, "locks": self._locks}
            return ray_runtime.spawn(SlowSupervisor, **{**options, "kwargs": {**options["kwargs"], **told}})
        if actor_class is ExpertProcess:
            told_env = {ROW_US: str(self._row_us), LOCKS: self._locks}
            return ray_runtime.spawn(SlowProcess, **{**options, "env": {**options["env"], **told_env}})
        return ray_runtime.spawn(actor_class, **options)


class SlowSupervisor(Supervisor):
    """The real supervisor over that runtime."""

    def __init__(self, *, config: ClusterConfig, row_us: float, locks: str) -> None:
        super().__init__(config=config, runtime=SlowRuntime(row_us, locks))
