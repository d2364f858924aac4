"""The simulator's constants from what a live cluster measured, and the scenario that predicts its next run with them.

Per step a coordinator's own time is affine in the step's tokens, and its wait for experts affine in the tokens of each
layer's busiest expert process (`cluster.simulate`'s model). Processes that share cores are slower than alone: what is
fitted is what they take together, so it holds for a machine and a number of processes about like those measured.

A mean step's busiest expert has fewer rows than the busiest experts of single steps have on average, which is what
steps wait for. Counters tell the first only; so the phases that were measured are simulated, and the second is taken
from there (`experiments.scenario.fidelity`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.service_time import ServiceTime
from protos.coordinator_pb2 import SnapshotReply

FloatArray = npt.NDArray[np.float64]

MIN_WEIGHT = 1e-6
CORRECTIONS = 400


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Totals between two snapshots: steps, seconds of the coordinator and of waiting, rows by expert (L, E), messages
    to experts. `row_s` is what a row more takes at an expert, by what coordinators fit; 0 where that is not known.
    """

    steps: int
    own_s: float
    wait_s: float
    load_LE: FloatArray
    messages: int = 0
    row_s: float = 0.0

    @property
    def busiest(self) -> float:
        """Rows of the busiest expert in a mean step, summed over layers; a step asks at least one row of somebody."""
        return float(np.maximum(self.load_LE.max(axis=1) / self.steps, 1.0).sum())

    @property
    def token_s(self) -> float:
        """Seconds for a row of the first layer, of which every token has as many."""
        return (self.own_s + self.wait_s) / float(self.load_LE[0].sum())


def together(several: Sequence[Measured]) -> Measured:
    """At least one, summed."""
    return Measured(
        steps=sum(one.steps for one in several),
        own_s=sum(one.own_s for one in several),
        wait_s=sum(one.wait_s for one in several),
        load_LE=np.sum([one.load_LE for one in several], axis=0),
        messages=sum(one.messages for one in several),
        row_s=several[-1].row_s,
    )


def measured(before: SnapshotReply, after: SnapshotReply, busy_s: float = 0.0) -> Measured:
    """What happened in between. Raises ValueError where no step did.

    `busy_s`: for so long there was always something to do, where that is known; what passed between steps then counts
    as the coordinator's time too.
    """

    def passed(name: str) -> float:
        return float(getattr(after, name) - getattr(before, name))

    steps, wait_s = int(passed("steps_total")), passed("expert_wait_s_total")
    if steps < 1:
        raise ValueError("no step was made between the two snapshots")
    load_LE = np.array([layer.tokens for layer in after.load], np.float64)
    if before.load:
        load_LE -= np.array([layer.tokens for layer in before.load], np.float64)
    return Measured(
        steps=steps,
        own_s=max(passed("step_s_total"), busy_s) - wait_s,
        wait_s=wait_s,
        load_LE=load_LE,
        messages=int(passed("wire_messages_total")),
        row_s=_row_s(after),
    )


def _row_s(snapshot: SnapshotReply) -> float:
    """Of the replicas that did something, each as much as it did."""
    tokens = sum(one.tokens_total for one in snapshot.replica_times)
    return sum(one.tokens_total * one.b_us for one in snapshot.replica_times) * 1e-6 / max(tokens, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Constants for `SimulationConfig`, and each layer's popularity of experts, (L, E)."""

    cost: ServiceTime
    step_cost: ServiceTime
    popularity_LE: FloatArray


def calibrate(points: Sequence[Measured], top_k: int, busiest: Sequence[float] | None = None) -> Calibration:
    """The non-negative lines that fit all points, with which all steps together take as long as they did.

    `busiest`: for each point the rows that a step waits for, summed over layers; by its mean step without it. Steps
    that are longer than the time between two snapshots are half in one and half in the other: so the slope of waiting
    is no less than what experts' own calls say.
    """
    if not points:
        raise ValueError("there is no measurement to calibrate with")
    num_layers, steps = len(points[0].load_LE), [p.steps for p in points]
    tokens = [float(p.load_LE[0].sum()) / top_k / p.steps for p in points]
    own = _line(tokens, [p.own_s / p.steps for p in points], steps)
    rows = [num / num_layers for num in ([p.busiest for p in points] if busiest is None else busiest)]
    row_s = sum(p.row_s * p.steps for p in points) / sum(steps)
    wait = _line(rows, [p.wait_s / p.steps / num_layers for p in points], steps, row_s)
    total_LE: FloatArray = np.sum([p.load_LE for p in points], axis=0)
    return Calibration(wait, own, total_LE / np.maximum(total_LE.sum(axis=1, keepdims=True), 1))


def drawing_weights(shares_LE: FloatArray, top_k: int) -> FloatArray:
    """Weights with which each expert comes up as often as seen, where `top_k` different ones are drawn for a token.

    `shares_LE` are parts of a layer's rows, each layer's sum is 1. Drawing with the shares themselves would give a
    popular expert too few: it cannot be drawn twice. Solved for one and for two of a token, by repeated correction
    (an expert that every token has, share 1 / `top_k`, gets nearly all weight); for more they are the shares.

    >>> drawing_weights(np.array([[0.5, 0.25, 0.25]]), 2).round(3).tolist()
    [[0.964, 0.018, 0.018]]
    """
    weights_LE: FloatArray = np.clip(shares_LE, MIN_WEIGHT, None)
    weights_LE /= weights_LE.sum(axis=1, keepdims=True)
    if top_k != 2 or shares_LE.shape[1] <= top_k:
        return weights_LE
    for _ in range(CORRECTIONS):
        odds_LE = weights_LE / (1 - np.minimum(weights_LE, 1 - MIN_WEIGHT))
        drawn_LE = weights_LE * (1 + odds_LE.sum(axis=1, keepdims=True) - odds_LE)
        weights_LE = np.clip(weights_LE * np.clip(shares_LE * top_k, MIN_WEIGHT, 1.0) / drawn_LE, MIN_WEIGHT, None)
        weights_LE /= weights_LE.sum(axis=1, keepdims=True)
    return weights_LE


def _line(xs: Sequence[float], ys: Sequence[float], weights: Sequence[float], least_slope: float = 0.0) -> ServiceTime:
    """Through the weighted mean of all points; the slope fits their relative errors best."""
    x, y, weight = np.array(xs), np.array(ys), np.array(weights, np.float64)
    x_mean, y_mean = float(np.average(x, weights=weight)), float(np.average(y, weights=weight))
    slope = 0.0
    if len(x) > 1 and np.ptp(x) >= 1e-9 * x.max():
        each = np.sqrt(weight) / np.maximum(y, 1e-12)
        slope = float(np.linalg.lstsq(np.stack([each, x * each], axis=1), y * each, rcond=None)[0][1])
    slope = min(max(slope, least_slope), y_mean / max(x_mean, 1e-12))
    return ServiceTime(max(y_mean - slope * x_mean, 0.0), slope)
