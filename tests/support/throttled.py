"""A cluster whose experts are slow by decree, for tests of balancing: every row costs so long, asleep, in its process.

On a machine with few cores that is how experts can be the bottleneck, and copies on other "machines" help. Only a test
that starts this supervisor itself gets such experts: no configuration leads here.
"""

from typing import Any

from actors import ray_runtime
from actors.expert.process import ExpertProcess
from actors.supervision.supervisor import Supervisor
from cluster.config import ClusterConfig
from experiments.scenario.slow_process import ROW_US, SlowProcess

ROW_COSTS_US = 1000.0


class ThrottlingRuntime:
    """Ray, but for the class of the experts, which take `row_us` more for each row."""

    def __init__(self, row_us: float) -> None:
        self._row_us = row_us

    def __getattr__(self, name: str) -> Any:
        return getattr(ray_runtime, name)

    def spawn(self, actor_class: type, **options: Any) -> Any:
        """See `actors.ray_runtime.spawn`."""
        if actor_class is not ExpertProcess:
            return ray_runtime.spawn(actor_class, **options)
        env = {**options["env"], ROW_US: str(self._row_us)}
        return ray_runtime.spawn(SlowProcess, **{**options, "env": env})


class ThrottledSupervisor(Supervisor):
    """The real supervisor over that runtime; it is spawned by its real name, so that every command finds it."""

    def __init__(self, *, config: ClusterConfig, row_us: float = ROW_COSTS_US) -> None:
        super().__init__(config=config, runtime=ThrottlingRuntime(row_us))
