"""How long a step would take on so many hosts: the affine model, from what recent windows showed.

A step costs a part that is always paid and a part for each token. Where tokens come at a given rate, the second part
takes a share of all time that no step's length changes, the *load share*; so steps take (what is always paid) ÷ (1 -
load share), and get long as it nears 1. How long steps wait for experts in all is no such signal: while anybody
generates, one step follows the other, on many hosts as on few. How many hosts there should be is `autoscale`'s
decision. Letters as in `layout`.
"""

from dataclasses import dataclass, replace

import numpy as np

from cluster.layout import FloatArray, Layout
from cluster.policy import Observation
from cluster.predictive import Forecast

JUMP = 0.5
"""A window whose load is so much above what was expected, and three deviations, is a new load and no noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """One layout's figures, and what they would be on another number of hosts.

    `fixed_s` is what a step pays on its busiest hosts whatever its tokens, `load_share` the share of time for what
    grows with tokens; each has a floor that more hosts do not lower: an expert's call is one host's, and a batch is not
    cut into parts that cost more to begin than to do. `own_s` is the coordinator's part of a step, `period_s`
    the time from one step to the next; 0 where no step was seen.
    """

    num_hosts: int
    fixed_s: float
    fixed_floor_s: float
    load_share: float
    load_floor: float
    own_s: float
    period_s: float

    def shares(self, hosts_N: FloatArray, factor: float = 1.0) -> FloatArray:
        """Load share on each of these numbers of hosts, with `factor` times the load."""
        share_N: FloatArray = factor * np.maximum(self.load_share * self.num_hosts / hosts_N, self.load_floor)
        return share_N

    def returns(self, hosts_N: FloatArray) -> FloatArray:
        """What a host more would bring, as a part of its share in the hosts: 1 halves a step by doubling the hosts.

        Of a step of the present size.
        """
        scale_N = self.num_hosts / hosts_N
        falls_N = np.where(self.fixed_s * scale_N > self.fixed_floor_s, self.fixed_s * scale_N, 0.0)
        rest_N = self.own_s + np.where(falls_N > 0, 0.0, self.fixed_floor_s)
        load_N = self.load_share * scale_N
        falls_N += np.where(load_N > self.load_floor, load_N, 0.0) * self.period_s
        rest_N += np.where(load_N > self.load_floor, 0.0, self.load_floor) * self.period_s
        parts: FloatArray = falls_N / np.maximum(falls_N + rest_N, 1e-300)
        return parts

    def steps_s(self, hosts_N: FloatArray, factor: float = 1.0) -> FloatArray:
        """Length of a step on each of these numbers of hosts; infinite where they could not keep up."""
        fixed_N = self.own_s + np.maximum(self.fixed_s * self.num_hosts / hosts_N, self.fixed_floor_s)
        free_N = 1.0 - self.shares(hosts_N, factor)
        steps_s = np.full(len(hosts_N), np.inf)
        np.divide(fixed_N, free_N, out=steps_s, where=free_N > 1e-9)
        return steps_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What the recent windows showed: growing work with its trend, what a step pays always, and how it all varies.

    `call_LE` is the fixed work of one step, `own_s` the coordinator's part of one, `steps_per_s` their rate; all 0
    until a step was seen.
    `variance` is of a window's load relative to what was expected.
    """

    growing: Forecast
    call_LE: FloatArray
    own_s: float = 0.0
    steps_per_s: float = 0.0
    variance: float = 0.0

    @classmethod
    def first(cls, seen: Observation) -> "Demand":
        """From the first window; nothing is known about the variance."""
        growing_LE = seen.growing
        start = cls(growing=Forecast(growing_LE, np.zeros_like(growing_LE), seen.now_s), call_LE=0 * growing_LE)
        return start._with_steps(seen, 1.0)

    def seen(self, seen: Observation, half_life_s: float) -> "Demand":
        """After one more window. What was known weighs half after `half_life_s`, the variance four times as long."""
        gap_s = seen.now_s - self.growing.at_s
        if gap_s <= 0:
            return self
        expected = float(self.growing.level_LE.sum() + gap_s * self.growing.trend_LE.sum())
        residual = float(seen.growing.sum()) / expected - 1 if expected > 1e-12 else 0.0
        slow = 1 - 0.5 ** (gap_s / (4 * half_life_s))
        growing = self.growing.seen(seen.growing, seen.now_s, half_life_s)
        if residual > max(JUMP, 3 * self.deviation):
            growing = Forecast(seen.growing, np.zeros_like(seen.growing), seen.now_s)
        after = replace(
            self,
            growing=growing,
            # A first rush is no measure of how a load varies.
            variance=(1 - slow) * self.variance + slow * min(residual * residual, 1.0),
        )
        return after._with_steps(seen, 1 - 0.5 ** (gap_s / half_life_s) if self.steps_per_s > 0 else 1.0)

    def _with_steps(self, seen: Observation, weight: float) -> "Demand":
        if not (seen.steps_per_s > 0 and seen.step_s > 0):
            return self
        call_LE = (seen.work_LE - seen.growing) / seen.steps_per_s
        fixed_s = float(np.maximum(_busiest(seen.layout, call_LE), call_LE.max(axis=1)).sum())
        load_s = float(_busiest(seen.layout, seen.growing).sum()) / seen.steps_per_s
        own_s = max(seen.step_s - fixed_s - load_s, 0.0)
        return replace(
            self,
            call_LE=weight * call_LE + (1 - weight) * self.call_LE,
            own_s=weight * own_s + (1 - weight) * self.own_s,
            steps_per_s=weight * seen.steps_per_s + (1 - weight) * self.steps_per_s,
        )

    @property
    def deviation(self) -> float:
        """How far a window's load is typically from what was expected, relative to it."""
        return float(np.sqrt(self.variance))

    def model(self, layout: Layout, lead_s: float, *, balanced: bool = False) -> StepModel:
        """On this layout, for the load that is expected in `lead_s`; no less than now's where it falls.

        `balanced`: as if every host worked as long as any other.
        """
        growing_LE = np.maximum(self.growing.ahead(lead_s), self.growing.level_LE)
        alone_L = self.call_LE.max(axis=1)
        slowest = _even if balanced else _busiest
        calls_L, load_L = slowest(layout, self.call_LE), slowest(layout, growing_LE)
        return StepModel(
            num_hosts=max(sum(not host.draining for host in layout.hosts), 1),
            fixed_s=float(np.maximum(calls_L, alone_L).sum()),
            fixed_floor_s=float(alone_L.sum()),
            load_share=float(load_L.sum()),
            load_floor=float(np.minimum(growing_LE, self.steps_per_s * self.call_LE).max(axis=1).sum()),
            own_s=self.own_s,
            period_s=1 / self.steps_per_s if self.steps_per_s > 0 else 0.0,
        )


def _busiest(layout: Layout, work_LE: FloatArray) -> FloatArray:
    """Work of each layer's busiest host."""
    busiest_L: FloatArray = layout.busy_LN(work_LE).max(axis=1, initial=0.0)
    return busiest_L


def _even(layout: Layout, work_LE: FloatArray) -> FloatArray:
    """Work of each layer on every host if all that are not draining did the same."""
    speed = sum(host.speed * host.parallelism for host in layout.hosts if not host.draining)
    even_L: FloatArray = work_LE.sum(axis=1) / max(speed, 1e-9)
    return even_L
