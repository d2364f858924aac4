"""The process of an expert that is slow by decree, as it begins: like the real one, a gentle one imports behind others.

So this module imports no more than `actors.expert.process` does. `experiments.scenario.slow_experts` starts such
processes, and says by the environment how slow they are.
"""

import fcntl
import os
import time
from pathlib import Path
from typing import IO, Any

from actors.expert.process import ExpertProcess

ROW_US = "OCTAVO_EXPERIMENT_ROW_US"
LOCKS = "OCTAVO_EXPERIMENT_LOCKS"


class SlowProcess(ExpertProcess):
    """An expert process whose rows take longer, with a directory for locks one after another with its node's others."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        locks = os.environ.get(LOCKS)
        lock = (Path(locks) / f"node-{kwargs['node_id']}").open("wb") if locks else None
        slow_down(float(os.environ[ROW_US]) * 1e-6, lock)


def slow_down(row_s: float, lock: IO[bytes] | None) -> None:
    """Every row of this process's experts takes `row_s` seconds more, in which it holds the lock."""
    from torch import Tensor

    from model.experts import ExpertColumn

    quick = ExpertColumn.forward

    def slow(self: ExpertColumn, layer: int, x_MD: Tensor) -> Tensor:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            time.sleep(row_s * len(x_MD))
        finally:
            if lock is not None:
                fcntl.flock(lock, fcntl.LOCK_UN)
        return quick(self, layer, x_MD)

    ExpertColumn.forward = slow  # type: ignore[method-assign]  # of this process, which is all this actor's
