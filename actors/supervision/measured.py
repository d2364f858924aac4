"""Shows the cluster's metrics through the runtime's own exporter, from the process that sees the whole cluster.

The same families as on the front door's `/metrics`; what they are is `actors.metrics`' knowledge.
"""

import logging
import time
from collections.abc import Callable, Iterable

from actors.metrics.cluster import ClusterMetrics
from actors.metrics.coordinators import CoordinatorMetrics
from actors.metrics.runtime_export import RuntimeExport
from actors.supervision.member import View
from actors.supervision.runtime import Runtime
from actors.supervision.status import ClusterStatus

LOG = logging.getLogger(__name__)

EXPORT_S = 5.0
"""Between two exports; Ray itself reports every 10 s."""


class Measured:
    """Of one supervisor. Nothing that goes wrong here comes out: metrics must not end a round."""

    def __init__(self, runtime: Runtime, clock: Callable[[], float] = time.monotonic) -> None:
        self._export = RuntimeExport(runtime.metric)
        self._coordinators = CoordinatorMetrics()
        self._cluster = ClusterMetrics()
        self._clock = clock
        self._exported_s = -float("inf")

    def tell(self, status: Callable[[], ClusterStatus], coordinators: Iterable[View]) -> None:
        """Exports, if it is time."""
        if self._clock() - self._exported_s < EXPORT_S:
            return
        self._exported_s = self._clock()
        try:
            facts = [view.info for view in coordinators if view.info is not None and view.dead is None]
            self._export.export(self._coordinators.families(facts))
            self._export.export(self._cluster.families(status()))
        except Exception:
            LOG.exception("the cluster's metrics could not be exported")
