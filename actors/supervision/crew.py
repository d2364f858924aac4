"""Which coordinators there should be now: a fixed number, or one that follows what they say of themselves.

The decision is `cluster.coordinator_count`'s; starting and draining them is their keeper's work. Those of the lowest
numbers stay, so that a smaller number means the same to everybody.
"""

from collections.abc import Callable, Collection, Iterable

from actors.supervision.member import View
from cluster.config import ClusterConfig
from cluster.coordinator_count import CoordinatorLoad, CountState
from cluster.ids import CoordinatorId


class Crew:
    """The coordinators of one cluster, asked once in every round of the supervisor."""

    def __init__(self, config: ClusterConfig, say: Callable[[str], None]) -> None:
        self._policy = config.count_policy
        self._max_seqs = config.max_num_seqs
        self._num_fixed = config.coordinators
        self._say = say
        self._state: CountState | None = None

    @property
    def wanted(self) -> tuple[CoordinatorId, ...]:
        """coordinator-0, coordinator-1, …"""
        num = self._num_fixed if self._state is None else self._state.wanted
        return tuple(CoordinatorId(f"coordinator-{index}") for index in range(num))

    def look(self, views: Collection[View], now_s: float) -> tuple[CoordinatorId, ...]:
        """Those that are wanted after a look at those that are there.

        The first look of a new supervisor finds those that an earlier one wanted.
        """
        if self._policy is None:
            return self.wanted
        if self._state is None:
            alive = [view for view in views if view.dead is None and view.state != "draining"]
            self._state = self._policy.begin(len(alive) or self._num_fixed)
        loads = list(self._loads(view for view in views if view.process_id in self.wanted))
        self._state, why = self._policy.decide(loads, now_s, self._state)
        if why:
            self._say(why)
        return self.wanted

    def _loads(self, views: Iterable[View]) -> Iterable[CoordinatorLoad]:
        for view in views:
            if view.dead is None and view.info is not None and view.state == "ready":
                info = view.info
                blocks = max(int(info["kv_blocks_total"]), 1)
                kv_used = 1 - int(info["kv_blocks_free"]) / blocks
                used = max(kv_used, int(info["num_running"]) / self._max_seqs)
                yield CoordinatorLoad(used=used, num_waiting=int(info["num_waiting"]))
