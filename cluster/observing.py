"""What coordinators count, made into what a balancing policy is shown: work per expert and layer, and hosts' speeds.

Counters are since start, so that the window is the time between two looks and is known exactly. Reading the counters,
and asking a policy, is done elsewhere. L layers, E experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from cluster.desired import DesiredReplica
from cluster.ids import NodeId, ReplicaId
from cluster.layout import FloatArray, IntArray

MIN_BUSY_S = 0.05
"""A host that has worked less in the window tells nothing about its speed."""
SPEED_LIMITS = (0.1, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaTimes:
    """What one coordinator's calls to one replica cost since start, and the fit a + b · tokens of one call."""

    calls: int
    tokens: int
    compute_s: float
    a_s: float = 0.0
    b_s: float = 0.0

    @property
    def growing_share(self) -> float:
        """The part of its time that grows with tokens, by the fit; 1.0 where there is none."""
        fixed_s, growing_s = self.a_s * self.calls, self.b_s * self.tokens
        return growing_s / (fixed_s + growing_s) if fixed_s + growing_s > 0 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """One coordinator's counters: routed tokens by layer and expert, time in the experts' kernels, by replica if known.

    `queue_s` is how long its oldest request waits now; `steps` it has made, in `step_s`, with `batches`. `divisible_LE`
    is the part of the tokens that replicas would share, None where that is not told.
    """

    tokens_LE: IntArray
    compute_s: float
    queue_s: float = 0.0
    steps: int = 0
    step_s: float = 0.0
    replicas: Mapping[ReplicaId, ReplicaTimes] = field(default_factory=dict)
    divisible_LE: IntArray | None = None
    batches: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """All coordinators at one time, of any clock that does not step back."""

    at_s: float
    coordinators: Mapping[str, Counted]


@dataclass(frozen=True, slots=True)
class Measured:
    """What happened between two looks: `work_LE` in seconds of a host of speed 1 per second, tokens per second.

    `growing_LE` is the part of the work that grows with tokens, `divisible_LE` what replicas would share of that, None
    where it is not told. One of `steps_per_s` steps took `step_s`; `batches` are at the experts at a time, at least 1.
    """

    work_LE: FloatArray
    tokens_LE: FloatArray
    queue_s: float
    speeds: Mapping[NodeId, float]
    growing_LE: FloatArray
    steps_per_s: float
    step_s: float
    divisible_LE: FloatArray | None
    batches: float


def measure(
    first: Look,
    last: Look,
    shape: tuple[int, int],
    replicas: Iterable[DesiredReplica],
    places: Mapping[ReplicaId, NodeId],
) -> Measured | None:
    """None while there is nothing to compare: no time between the looks, or no coordinator in both.

    One that began anew in between counts from 0. `shape` is (L, E).
    """
    period_s = last.at_s - first.at_s
    pairs = [(first.coordinators[name], now) for name, now in last.coordinators.items() if name in first.coordinators]
    if period_s <= 0 or not pairs:
        return None
    tokens_LE = np.zeros(shape)
    for before, now in pairs:
        tokens_LE += _grown(now.tokens_LE, before.tokens_LE)
    compute_s = sum(_since(now.compute_s, before.compute_s) for before, now in pairs)
    times = _times(pairs)
    speeds = _speeds(times, places)
    if times:
        work_LE, growing_LE = _by_replica(times, tokens_LE, replicas, places, speeds)
    else:
        work_LE = growing_LE = tokens_LE * (compute_s / max(float(tokens_LE.sum()), 1.0))
    steps = sum(_since(now.steps, before.steps) for before, now in pairs)
    step_s = sum(_since(now.step_s, before.step_s) for before, now in pairs)
    return Measured(
        work_LE=work_LE / period_s,
        tokens_LE=tokens_LE / period_s,
        queue_s=max(now.queue_s for now in last.coordinators.values()),
        speeds=speeds,
        growing_LE=growing_LE / period_s,
        steps_per_s=steps / period_s,
        step_s=step_s / steps if steps else 0.0,
        divisible_LE=_divisible(pairs, tokens_LE, growing_LE / period_s),
        batches=max(sum(_batches(before, now) for before, now in pairs), 1.0),
    )


def _grown(now_LE: IntArray, before_LE: IntArray) -> IntArray:
    grown_LE: IntArray = now_LE - before_LE
    return now_LE if (grown_LE < 0).any() else grown_LE


def _divisible(
    pairs: Sequence[tuple[Counted, Counted]], tokens_LE: FloatArray, growing_LE: FloatArray
) -> FloatArray | None:
    """Of the work that grows, the tokens' part that replicas would share; None unless every coordinator tells it."""
    shared_LE = np.zeros(tokens_LE.shape)
    for before, now in pairs:
        if before.divisible_LE is None or now.divisible_LE is None:
            return None
        shared_LE += _grown(now.divisible_LE, before.divisible_LE)
    divisible_LE: FloatArray = growing_LE * np.minimum(shared_LE / np.maximum(tokens_LE, 1.0), 1.0)
    return divisible_LE


def _batches(before: Counted, now: Counted) -> float:
    """How many of a coordinator's batches are at the experts at a time: microbatches; 0 while it makes no steps."""
    steps = _since(now.steps, before.steps)
    return _since(now.batches, before.batches) / steps if steps else 0.0


def _since(now: float, before: float) -> float:
    return now if now < before else now - before


def _times(pairs: Iterable[tuple[Counted, Counted]]) -> dict[ReplicaId, ReplicaTimes]:
    """What all coordinators' calls to each replica cost between the looks."""
    found: dict[ReplicaId, list[ReplicaTimes]] = {}
    for before, now in pairs:
        for replica_id, times in now.replicas.items():
            old = before.replicas.get(replica_id)
            if old is not None and old.calls <= times.calls:
                times = ReplicaTimes(
                    calls=times.calls - old.calls,
                    tokens=times.tokens - old.tokens,
                    compute_s=_since(times.compute_s, old.compute_s),
                    a_s=times.a_s,
                    b_s=times.b_s,
                )
            found.setdefault(replica_id, []).append(times)
    return {replica_id: _summed(several) for replica_id, several in found.items()}


def _summed(several: list[ReplicaTimes]) -> ReplicaTimes:
    return ReplicaTimes(
        calls=sum(one.calls for one in several),
        tokens=sum(one.tokens for one in several),
        compute_s=sum(one.compute_s for one in several),
        a_s=median(one.a_s for one in several),
        b_s=median(one.b_s for one in several),
    )


def _speeds(times: Mapping[ReplicaId, ReplicaTimes], places: Mapping[ReplicaId, NodeId]) -> dict[NodeId, float]:
    """How fast each node computes what it got, relative to the median replica's fit; 1.0 where too little is known."""
    fitted = [one for one in times.values() if one.a_s > 0 or one.b_s > 0]
    if not fitted:
        return {}
    a_s, b_s = median(one.a_s for one in fitted), median(one.b_s for one in fitted)
    expected: dict[NodeId, float] = {}
    actual: dict[NodeId, float] = {}
    for replica_id, one in times.items():
        node_id = places.get(replica_id)
        if node_id is not None:
            expected[node_id] = expected.get(node_id, 0.0) + a_s * one.calls + b_s * one.tokens
            actual[node_id] = actual.get(node_id, 0.0) + one.compute_s
    low, high = SPEED_LIMITS
    return {
        node_id: min(max(expected[node_id] / spent_s, low), high)
        for node_id, spent_s in actual.items()
        if spent_s >= MIN_BUSY_S and expected[node_id] > 0
    }


def _by_replica(
    times: Mapping[ReplicaId, ReplicaTimes],
    tokens_LE: FloatArray,
    replicas: Iterable[DesiredReplica],
    places: Mapping[ReplicaId, NodeId],
    speeds: Mapping[NodeId, float],
) -> tuple[FloatArray, FloatArray]:
    """Each replica's time, given to what it holds in proportion to the tokens there; all of it, and what grows."""
    work_LE, growing_LE = np.zeros(tokens_LE.shape), np.zeros(tokens_LE.shape)
    for one in replicas:
        spent = times.get(one.replica_id)
        if spent is None:
            continue
        place = np.ix_(range(one.first_layer, one.first_layer + one.num_layers), one.expert_ids)
        share = tokens_LE[place] / max(float(tokens_LE[place].sum()), 1.0)
        node_id = places.get(one.replica_id)
        took = spent.compute_s * (1.0 if node_id is None else speeds.get(node_id, 1.0)) * share
        work_LE[place] += took
        growing_LE[place] += took * spent.growing_share
    return work_LE, growing_LE
