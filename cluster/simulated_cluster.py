"""The hosts of a simulation: what a policy's actions do, and when, on a clock that is told.

Loads take time and serve when they are done; what waits for what is as it is live (`policy.waits_for`). Hosts come
some time after they were asked for and are paid for from then on. What to do is a policy's decision, what it costs a
step `simulate`'s.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count, cycle

from cluster.ids import NodeId
from cluster.layout import Host, Layout
from cluster.policy import Action, AddHosts, Copy, DrainHost, Drop, KeepHost, RemoveHost, apply, waits_for


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedFault:
    """At `at_s` the first host with `unit`: lost, and replaced by an empty one; or `factor` times slower for `for_s`.

    `factor` infinite is lost.
    """

    at_s: float
    unit: int
    factor: float = float("inf")
    for_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Logged:
    """An action, and when it was decided."""

    at_s: float
    action: Action


class SimulatedCluster:
    """Hosts like `template` may be added, and start in `host_start_s`; each host loads `load_bytes_per_s`. Loads take
    in turn `load_factors` times as long, over and over.

    At most `max_loading` loads are under way at a time, those that were decided first before others; None: as many as
    there are.
    """

    def __init__(
        self,
        layout: Layout,
        template: Host,
        *,
        load_bytes_per_s: float,
        host_start_s: float,
        max_loading: int | None = None,
        load_factors: tuple[float, ...] = (1.0,),
    ) -> None:
        if not (load_factors and all(0 < factor < float("inf") for factor in load_factors)):
            raise ValueError(f"load_factors are {load_factors}, but must be at least one, all above 0 and finite")
        if not (load_bytes_per_s > 0 and host_start_s >= 0 and (max_loading is None or max_loading >= 1)):
            raise ValueError(
                f"load_bytes_per_s is {load_bytes_per_s}, host_start_s {host_start_s}, max_loading {max_loading}: "
                "above 0, at least 0, at least 1"
            )
        self.layout = layout
        self.moved_bytes = 0
        self.num_copies = 0
        self.host_seconds = 0.0
        self.log: list[Logged] = []
        self.max_log = 2000
        self._template = template
        self._rate, self._start_s = load_bytes_per_s, host_start_s
        self._factors = cycle(load_factors)
        self._due: list[tuple[float, int, Copy | Drop | AddHosts]] = []
        self._order = count()
        self._max_loading = max_loading
        self._places_s: list[float] = []
        self._loading: list[tuple[float, float]] = []
        self._num_made = len(layout.hosts)
        self._num_coming = 0
        self._accounted_s = 0.0

    @property
    def num_paid(self) -> int:
        """Hosts that are there or have been asked for."""
        return len(self.layout.hosts) + self._num_coming

    @property
    def is_moving(self) -> bool:
        """Loads or drops are under way."""
        return any(not isinstance(action, AddHosts) for _, _, action in self._due)

    def is_loading(self, now_s: float) -> bool:
        """A load has begun and is not done."""
        self._loading = [load for load in self._loading if load[1] > now_s]
        return any(begin_s <= now_s for begin_s, _ in self._loading)

    @property
    def next_due_s(self) -> float:
        """When the next thing under way is done; infinite where there is none."""
        return self._due[0][0] if self._due else float("inf")

    def do(self, actions: Iterable[Action], now_s: float, *, at_once: bool = False) -> None:
        """Begins the actions; with `at_once` loads take no time, as before anybody is served."""
        self._account(now_s)
        actions = tuple(actions)
        done_s: list[float] = []
        for action, before in zip(actions, waits_for(actions), strict=True):
            if len(self.log) < self.max_log:
                self.log.append(Logged(now_s, action))
            begin_s = max((done_s[place] for place in before), default=now_s)
            takes_s = self._begin(action, at_once=at_once)
            done_s.append(self._load(begin_s, takes_s) if takes_s else begin_s)
            if isinstance(action, Copy | Drop):
                heapq.heappush(self._due, (done_s[-1], next(self._order), action))
            elif isinstance(action, AddHosts):
                heapq.heappush(self._due, (now_s + self._start_s, next(self._order), action))
        if at_once:
            self.advance(now_s)

    def _load(self, ready_s: float, takes_s: float) -> float:
        """When a load that could begin at `ready_s` is done: it begins once there is a place for it."""
        begin_s = ready_s
        if self._max_loading is not None:
            if len(self._places_s) == self._max_loading:
                begin_s = max(begin_s, heapq.heappop(self._places_s))
            heapq.heappush(self._places_s, begin_s + takes_s)
        self._loading.append((begin_s, begin_s + takes_s))
        return begin_s + takes_s

    def _begin(self, action: Action, *, at_once: bool) -> float:
        """Counts it, and how long it takes; who asks for hosts does not wait for them."""
        if isinstance(action, Copy):
            if at_once:
                return 0.0
            self.moved_bytes += action.num_bytes
            self.num_copies += 1
            return action.num_bytes / self._rate * next(self._factors)
        if isinstance(action, AddHosts):
            self._num_coming += action.num
        elif not isinstance(action, Drop):
            self._mark(action)
        return 0.0

    def advance(self, now_s: float) -> bool:
        """Finishes what is due; True when the layout has changed."""
        self._account(now_s)
        before = self.layout
        moves: list[Copy | Drop] = []
        while self._due and self._due[0][0] <= now_s:
            _, _, action = heapq.heappop(self._due)
            if isinstance(action, AddHosts):
                self.layout = apply(self.layout, moves)
                moves = []
                self._arrive(action.num)
            else:
                moves.append(action)
        if moves:
            self.layout = apply(self.layout, moves)
        return self.layout is not before

    def strike(self, fault: SimulatedFault, now_s: float) -> NodeId | None:
        """Does it to the first host that holds the unit, and names it; None where nobody does."""
        self._account(now_s)
        holders = self.layout.held_UN[fault.unit].nonzero()[0]
        if not len(holders):
            return None
        node_id = self.layout.hosts[int(holders[0])].node_id
        if fault.factor != float("inf"):
            self.slow(node_id, fault.factor)
            return node_id
        self.layout = self.layout.on([host for host in self.layout.hosts if host.node_id != node_id])
        # What was under way is void: its order and its sources may have been the lost host's.
        self._due = [due for due in self._due if isinstance(due[2], AddHosts)]
        self._places_s, self._loading = [], []
        self._num_coming += 1
        coming = AddHosts(num=1, reason=f"{node_id} is lost")
        self._due.append((now_s + self._start_s, next(self._order), coming))
        heapq.heapify(self._due)
        return node_id

    def slow(self, node_id: NodeId, factor: float) -> None:
        """The host, if it is there, becomes so many times slower (below 1: faster)."""
        hosts = [replace(h, speed=h.speed / factor) if h.node_id == node_id else h for h in self.layout.hosts]
        self.layout = self.layout.on(hosts)

    def _arrive(self, num: int) -> None:
        names = [NodeId(f"host-{self._num_made + i}") for i in range(num)]
        self._num_made += num
        self._num_coming -= num
        self.layout = self.layout.on([*self.layout.hosts, *(replace(self._template, node_id=name) for name in names)])

    def _mark(self, action: DrainHost | KeepHost | RemoveHost) -> None:
        hosts = list(self.layout.hosts)
        column = [host.node_id for host in hosts].index(action.node_id)
        if isinstance(action, RemoveHost):
            assert not self.layout.held_UN[:, column].any(), f"{action.node_id} is removed with units on it"
            hosts.pop(column)
        else:
            hosts[column] = replace(hosts[column], draining=isinstance(action, DrainHost))
        self.layout = self.layout.on(hosts)

    def _account(self, now_s: float) -> None:
        self.host_seconds += self.num_paid * max(now_s - self._accounted_s, 0.0)
        self._accounted_s = max(now_s, self._accounted_s)
