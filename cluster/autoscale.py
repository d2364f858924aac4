"""How many hosts there should be: one step at a time, and only where moving experts does not suffice.

Wraps a balancing policy. Each round asks it first, counts what its moves would bring, and only for what is still
missing asks for hosts (re-routing, which is cheaper yet, is the selector's and has happened before). What more or fewer
hosts would bring is `demand`'s model. How many coordinators there are is decided elsewhere.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cluster.demand import Demand, StepModel
from cluster.ids import NodeId
from cluster.layout import BoolArray, FloatArray, Layout, critical_share
from cluster.layout_draft import Draft
from cluster.mending import Allowance, copies_floor, mend
from cluster.policy import Action, AddHosts, DrainHost, KeepHost, Observation, Policy, RemoveHost, apply
from cluster.retries import Pauses

MAX_ADVICE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleState:
    """What the scaler remembers: the demand, advice of the last while as (time, hosts), hosts asked for, pauses.

    `expected` is the number of hosts that will be there once those asked for have come.
    """

    demand: Demand | None = None
    advice: tuple[tuple[float, int], ...] = ()
    changed_s: float = -math.inf
    expected: int = 0
    give_up_s: float = -math.inf
    drained_s: float = -math.inf
    pauses: Pauses[str] = field(default_factory=Pauses)
    inner: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaled:
    """The policy: as few hosts as keep the load share at `target_share` and a step within `target_step_s`.

    Both are of the load expected in `lead_s`, about the time that a host takes to come and to load its experts, and of
    `margin` times the load's usual deviation more; without `target_step_s` only the share counts. No host is added that
    would bring less than `min_return` of its share (`StepModel.returns`), target or not. A queue that would take
    `queue_s` doubles the load. Hosts are added at most `max_growth`-fold at once and not within `up_cooldown_s` of the
    last change. They are given back when for `down_window_s` fewer would have reached the targets with `tolerance` to
    spare, or come as near to them as any number: `max_shrink` of the hosts at once, one at least, begun one by one so
    that these take `down_cooldown_s` together. A host asked for that has not come in `host_timeout_s` is a failed
    action, as is a drain that long: it is tried again after a pause, and meanwhile balancing goes on.
    """

    inner: Policy
    min_hosts: int
    max_hosts: int
    target_share: float = 0.7
    target_step_s: float | None = None
    tolerance: float = 0.1
    min_return: float = 0.5
    margin: float = 1.0
    lead_s: float = 60.0
    half_life_s: float = 60.0
    queue_s: float = 5.0
    max_growth: float = 2.0
    max_shrink: float = 0.1
    up_cooldown_s: float = 15.0
    down_cooldown_s: float = 30.0
    down_window_s: float = 300.0
    host_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_hosts <= self.max_hosts:
            raise ValueError(f"min_hosts is {self.min_hosts} and max_hosts {self.max_hosts}: at least 1, ascending")
        if not (0 < self.target_share < 1 and (self.target_step_s is None or self.target_step_s > 0)):
            raise ValueError(
                f"target_share is {self.target_share} and target_step_s {self.target_step_s}; "
                "the first must be within 0 and 1, the second above 0"
            )
        if not (0 <= self.tolerance < 1 and self.margin >= 0 and self.lead_s >= 0 and self.half_life_s > 0):
            raise ValueError(
                f"tolerance is {self.tolerance}, margin {self.margin}, lead_s {self.lead_s} and half_life_s "
                f"{self.half_life_s}; they must be at least 0, the first below 1, the last above 0"
            )
        if not (self.max_growth > 1 and self.queue_s > 0 and 0 <= self.min_return <= 1 and 0 <= self.max_shrink < 1):
            raise ValueError(
                f"max_growth is {self.max_growth}, queue_s is {self.queue_s}, min_return is {self.min_return} and "
                f"max_shrink is {self.max_shrink}; they must be above 1, above 0, 0 to 1, and at least 0 and below 1"
            )

    def __call__(self, seen: Observation, state: ScaleState | None) -> tuple[tuple[Action, ...], ScaleState]:
        """One round: the inner policy's actions, and at most one about the number of hosts."""
        known = self._settled(seen, state or ScaleState())
        demand = Demand.first(seen) if known.demand is None else known.demand.seen(seen, self.half_life_s)
        actions, inner = self.inner(seen, known.inner)
        after = apply(seen.layout, actions)
        model = demand.model(after, self.lead_s)
        factor = (1 + self.margin * demand.deviation) * (1 + seen.queue_s / self.queue_s)
        # To give a host back the targets must be met with something to spare: what is let go must not be missed.
        enough = self._enough(model, factor, 1 - self.tolerance)
        spare = (seen.now_s, self._one_less(seen, after, demand, factor) if enough >= model.num_hosts else enough)
        recent = tuple(a for a in known.advice if a[0] > seen.now_s - self.down_window_s)
        known = replace(known, demand=demand, inner=inner, advice=(*recent, spare)[-MAX_ADVICE:])
        if self._moves_help(seen, after):
            # What balancing may still bring is cheaper than a host.
            model = demand.model(after, self.lead_s, balanced=True)
        more, known = self._hosts(seen, self._enough(model, factor, 1.0), known)
        return (*actions, *more), known

    def _enough(self, model: StepModel, factor: float, part: float) -> int:
        """The fewest hosts on which `factor` times the load reaches this part of the targets.

        No more than are useful, beyond those that are there; within the limits. Where no number of hosts reaches a
        target, the fewest that come as near as any: what more of them do not shorten is no reason to keep them.
        """
        hosts_N = np.arange(self.min_hosts, self.max_hosts + 1, dtype=np.float64)
        good_N = _as_low(model.shares(hosts_N, factor), part * self.target_share)
        useful_N = np.ones(len(hosts_N), np.bool_)
        if model.period_s > 0:
            useful_N = model.returns(np.maximum(hosts_N - 1, 1)) >= self.min_return
            if self.target_step_s is not None:
                good_N &= _as_low(model.steps_s(hosts_N, factor), part * self.target_step_s)
        wanted = int(hosts_N[int(np.argmax(good_N))])
        useful = int(hosts_N[useful_N][-1]) if useful_N.any() else self.min_hosts
        wanted = min(wanted, max(useful, model.num_hosts), math.ceil(model.num_hosts * self.max_growth))
        return max(self.min_hosts, wanted)

    def _one_less(self, seen: Observation, after: Layout, demand: Demand, factor: float) -> int:
        """One host less than are open, if the targets would be met with something to spare where units would be then.

        The model scales how uneven this layout is to any number of hosts. But spare copies make hosts uneven that do
        not serve much, and go with the host: so it is tried out.
        """
        num_open = sum(not host.draining for host in after.hosts)
        node_id = _least_missed(seen) if num_open == len(after.hosts) > self.min_hosts else None
        if node_id is None:
            return num_open
        left = after.on([host for host in after.hosts if host.node_id != node_id])
        draft = Draft(left, seen.work_LE)
        mend(draft, copies_floor(left), Allowance(int(left.grain.bytes_U.sum()), seen.forbidden))
        model = demand.model(Layout(left.grain, left.hosts, draft.held_UN), self.lead_s)
        hosts_N = np.array([num_open - 1], np.float64)
        part = 1 - self.tolerance
        fits = bool(model.shares(hosts_N, factor)[0] <= part * self.target_share)
        if self.target_step_s is not None and model.period_s > 0:
            fits = fits and bool(model.steps_s(hosts_N, factor)[0] <= part * self.target_step_s)
        return num_open - 1 if fits else num_open

    def _settled(self, seen: Observation, state: ScaleState) -> ScaleState:
        """Takes note of hosts that came or did not, and of what failed."""
        here = len(seen.layout.hosts)
        failed: list[str] = [type(a).__name__ for a in seen.failed if isinstance(a, AddHosts | RemoveHost | DrainHost)]
        if state.expected > here and seen.now_s >= state.give_up_s:
            failed.append(AddHosts.__name__)
        if AddHosts.__name__ in failed or state.expected <= here:
            state = replace(state, expected=0)
        return replace(state, pauses=state.pauses.failed(failed, seen.now_s))

    def _moves_help(self, seen: Observation, after: Layout) -> bool:
        """True while balancing still shortens the wait for the busiest hosts."""
        before = critical_share(seen.layout.busy_LN(seen.work_LE))
        return critical_share(after.busy_LN(seen.work_LE)) < 0.97 * before

    def _hosts(self, seen: Observation, advice: int, state: ScaleState) -> tuple[tuple[Action, ...], ScaleState]:
        """The cheapest step towards the advice: keep a host that drains, ask for more, let one go, drain one."""
        hosts, now_s = seen.layout.hosts, seen.now_s
        paused = state.pauses.paused(now_s)
        draining = [host.node_id for host in hosts if host.draining]
        num_open = len(hosts) - len(draining)
        coming = max(state.expected - len(hosts), 0)
        if advice > num_open and draining:
            why = f"{advice} hosts are wanted, {num_open} are open"
            return (KeepHost(node_id=draining[0], reason=why),), replace(state, changed_s=now_s)
        ended, state = self._drained(seen, draining, state)
        if ended:
            return ended, state
        if advice > num_open + coming:
            if AddHosts.__name__ in paused or now_s - state.changed_s < self.up_cooldown_s:
                return (), state
            num = advice - num_open - coming
            why = f"the load share would be above {self.target_share:.0%} on {num_open} hosts; {advice} are enough"
            asked = replace(state, changed_s=now_s, expected=len(hosts) + coming + num)
            return (AddHosts(num=num, reason=why),), replace(asked, give_up_s=now_s + self.host_timeout_s)
        return self._drain(seen, num_open, len(draining), state) if not coming else ((), state)

    def _drain(
        self, seen: Observation, num_open: int, num_draining: int, state: ScaleState
    ) -> tuple[tuple[Action, ...], ScaleState]:
        """Begins to give a host back, when fewer were wanted for long enough and not too many are going."""
        now_s = seen.now_s
        most = max(hosts_wanted for _, hosts_wanted in state.advice)
        at_once = max(int(num_open * self.max_shrink), 1)
        calm = now_s - state.changed_s >= self.down_cooldown_s / at_once
        known = state.advice[0][0] <= now_s - 0.8 * self.down_window_s
        if most < num_open and num_draining < at_once and calm and known:
            node_id = None if DrainHost.__name__ in state.pauses.paused(now_s) else _least_missed(seen)
            if node_id is not None:
                why = f"at most {most} of {num_open} hosts were wanted for {self.down_window_s:.0f} s"
                return (DrainHost(node_id=node_id, reason=why),), replace(state, changed_s=now_s, drained_s=now_s)
        return (), state

    def _drained(
        self, seen: Observation, draining: list[NodeId], state: ScaleState
    ) -> tuple[tuple[Action, ...], ScaleState]:
        """Lets a drained host go; keeps one that cannot be drained."""
        columns = {host.node_id: column for column, host in enumerate(seen.layout.hosts)}
        for node_id in draining:
            if not seen.layout.held_UN[:, columns[node_id]].any():
                if RemoveHost.__name__ in state.pauses.paused(seen.now_s):
                    return (), state
                return (RemoveHost(node_id=node_id, reason="it is drained"),), replace(state, changed_s=seen.now_s)
        if not draining or seen.now_s - state.drained_s < self.host_timeout_s:
            return (), state
        pauses = state.pauses.failed([DrainHost.__name__], seen.now_s)
        why = f"it could not be drained in {self.host_timeout_s:.0f} s"
        return (KeepHost(node_id=draining[0], reason=why),), replace(state, changed_s=seen.now_s, pauses=pauses)


def _as_low(values_N: FloatArray, target: float) -> BoolArray:
    """Where the target is reached, or as nearly as anywhere."""
    low_N: BoolArray = values_N <= max(target, float(values_N.min()) * (1 + 1e-9))
    return low_N


def _least_missed(seen: Observation) -> NodeId | None:
    """The host whose units have copies elsewhere and that works least; None where the others lack the slots.

    Going from two nodes for each unit to one is not a price for a host less.
    """
    layout = seen.layout
    busy_N = layout.busy_LN(seen.work_LE).sum(axis=0)
    alone_N = (layout.held_UN & (layout.copies_U == 1)[:, None]).sum(axis=0)
    floor = copies_floor(layout)
    for column in sorted(range(len(layout.hosts)), key=lambda n: (int(alone_N[n]), float(busy_N[n]), n)):
        host = layout.hosts[column]
        left = [other for other in layout.hosts if other is not host and not other.draining]
        if host.draining:
            continue
        if left and copies_floor(layout.on(left)) >= floor and sum(h.slots for h in left) >= layout.grain.num_units:
            return host.node_id
    return None
