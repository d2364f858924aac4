"""What one live run tells the simulator: its constants, and which experts were asked for when.

Whom a step waits for is its busiest node, or its busiest expert where each has a device of its own. Those of single
steps have more rows than those of a mean step: the run that told the constants is simulated too, and they are fitted
again (`experiments.scenario.calibration`). What messages and answers cost, steps with copies and without tell
(`spreading`): the simulation of both is to differ as they did. L layers, E experts, N hosts or experts, W windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from actors.supervision.status import ClusterStatus
from cluster.config import ClusterConfig
from cluster.ids import NodeId
from cluster.layout import FloatArray
from cluster.service_time import ServiceTime
from cluster.simulate import SimulationResult
from experiments.scenario.calibration import Measured, calibrate, drawing_weights, measured
from experiments.scenario.copying import CopyCost
from experiments.scenario.hand_made import last_phase
from experiments.scenario.prediction import Known, predict
from experiments.scenario.schema import Scenario
from experiments.scenario.spreading import Spread
from protos.coordinator_pb2 import SnapshotReply

NUM_REFINED = 2  # as in `experiments.scenario.fidelity`
STEADY_S = 40.0
"""Of a load that does not change, on the virtual clock."""
NUM_HALVED = 6
LEAST_TOKENS = 500
"""From fewer the popularity of experts is chance more than anything."""
LEAST_MORE = 0.1
"""Of the messages without copies, so many must there be more with them to tell what a message costs."""
LEAST_LEFT = 0.05
"""Of what was measured, so much stays who it was attributed to first."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One policy's live run: its result, the coordinator's counters at the ends of windows, and how it all began.

    `copy` and `spread` were measured after the first policy's.
    """

    result: SimulationResult
    snapshots: tuple[tuple[float, SnapshotReply], ...]
    first: ClusterStatus
    copy: CopyCost | None = None
    spread: Spread | None = None


def learn(scenario: Scenario, config: ClusterConfig, run: Recorded, top_k: int) -> Known:
    """From a run with `copy` in which nothing moved. Raises ValueError where nothing was served."""
    places = tuple(
        (expert, NodeId(one.node)) for one in run.first.replicas for expert in one.expert_ids if one.state == "ready"
    )
    windows = _windows(scenario, run.snapshots)
    if not windows or not places or run.copy is None:
        raise ValueError("nothing was served in the first policy's run")
    loads = _popularity(scenario, windows, top_k)
    shares_WLE = np.stack([load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1) for _, load_LE in loads])
    nothing = ServiceTime(0.0, 0.0)
    known = Known(
        cost=nothing,
        step_cost=nothing,
        message_s=0.0,
        answer_s=0.0,
        copy=run.copy if run.spread is None else replace(run.copy, took_s=run.copy.took_s + run.spread.took_s),
        places=places,
        window_end_s=np.array([at_s for at_s, _ in loads]),
        weights_WLE=np.stack([drawing_weights(shares_LE, top_k) for shares_LE in shares_WLE]),
    )
    fit = Fit.of(scenario, config, run.first, top_k, known, [one for _, one in windows])
    known = fit.refined(known)
    if run.spread is None:
        return known
    message_s = _message_s(run.spread, known.step_cost, top_k, [one for _, one in windows])
    known = fit.refined(replace(known, message_s=message_s))
    return fit.with_answers(known, run.spread)


def _windows(scenario: Scenario, snapshots: Sequence[tuple[float, SnapshotReply]]) -> list[tuple[float, Measured]]:
    """Each with its end; a window in which no step ended is a part of the next one, in which its rows are answered."""
    windows: list[tuple[float, Measured]] = []
    if snapshots:
        began_s, before = snapshots[0]
        for at_s, now in snapshots[1:]:
            if now.steps_total > before.steps_total:
                windows.append((at_s, measured(before, now, _busy_s(scenario, began_s, at_s))))
                began_s, before = at_s, now
    return windows


def _popularity(
    scenario: Scenario, windows: Sequence[tuple[float, Measured]], top_k: int
) -> list[tuple[float, FloatArray]]:
    """Rows by expert, each with the end of its time: of windows of one phase as many together as are enough to tell."""
    ends_s = np.cumsum([phase.duration_s for phase in scenario.phases])
    found: list[tuple[float, FloatArray]] = []
    for _, group in groupby(windows, key=lambda window: int(np.searchsorted(ends_s, window[0]))):
        of_phase: list[tuple[float, FloatArray]] = []
        for at_s, one in group:
            if of_phase and of_phase[-1][1][0].sum() < LEAST_TOKENS * top_k:
                of_phase[-1] = at_s, of_phase[-1][1] + one.load_LE
            else:
                of_phase.append((at_s, one.load_LE))
        if len(of_phase) > 1 and of_phase[-1][1][0].sum() < LEAST_TOKENS * top_k:
            at_s, rest_LE = of_phase.pop()
            of_phase[-1] = at_s, of_phase[-1][1] + rest_LE
        found += of_phase
    return found


def _busy_s(scenario: Scenario, began_s: float, at_s: float) -> float:
    """All of that time where clients that wait for their answers always left something to do, else 0."""
    ends_s = np.cumsum([phase.duration_s for phase in scenario.phases])
    first, last = np.searchsorted(ends_s, [began_s, at_s])
    waiting = last < len(ends_s) and all(phase.concurrency for phase in scenario.phases[first : last + 1])
    return at_s - began_s if waiting else 0.0


def _message_s(spread: Spread, step_cost: ServiceTime, top_k: int, windows: Sequence[Measured]) -> float:
    """What the coordinator's own time grew by, for each message more; tokens more are not the messages'.

    Nothing where copies made for few messages more: what else was different would be divided by next to nothing. Never
    more than all of a window's own time.
    """
    calm, kept = spread.calm, spread.kept
    more = kept.messages / kept.steps - calm.messages / calm.steps
    if more < LEAST_MORE * calm.messages / calm.steps:
        return 0.0
    tokens = [float(one.load_LE[0].sum()) / top_k / one.steps for one in (calm, kept)]
    own_s = kept.own_s / kept.steps - calm.own_s / calm.steps - step_cost.b_s * (tokens[1] - tokens[0])
    most_s = min((one.own_s / one.messages for one in (calm, *windows) if one.messages), default=0.0)
    return min(max(own_s / more, 0.0), most_s)


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """One run, as windows of those who are waited for; `calls` are theirs in a layer, `hot` their rows, of one a layer,
    summed over layers.
    """

    scenario: Scenario
    config: ClusterConfig
    first: ClusterStatus
    top_k: int
    points: tuple[Measured, ...]
    calls: float
    hot: float

    @classmethod
    def of(
        cls,
        scenario: Scenario,
        config: ClusterConfig,
        first: ClusterStatus,
        top_k: int,
        known: Known,
        windows: Sequence[Measured],
    ) -> "Fit":
        """`windows` as they were measured, by expert."""
        num_experts = windows[0].load_LE.shape[1]
        names = sorted({node for _, node in known.places})
        on_EN = np.zeros((num_experts, len(names)))
        for expert, node in known.places:
            on_EN[expert, names.index(node)] = 1.0
        if scenario.live.own_devices:
            on_EN = np.eye(num_experts)
        points = tuple(replace(one, load_LE=one.load_LE @ on_EN) for one in windows)
        loads_LN: FloatArray = np.sum([one.load_LE for one in points], axis=0)
        calls = float(on_EN[:, int(loads_LN.sum(axis=0).argmax())].sum())
        hot = float((loads_LN.max(axis=1) / np.maximum(loads_LN.sum(axis=1), 1)).sum())
        return cls(scenario, config, first, top_k, points, calls, hot)

    def refined(self, known: Known) -> Known:
        """Costs with which the run, simulated, takes as long as it did, given what messages and answers cost."""
        busier, late_s = 1.0, 0.0
        for _ in range(1 + NUM_REFINED):
            rest = [_without(one, known.message_s, late_s) for one in self.points]
            found = calibrate(rest, self.top_k, [busier * one.busiest for one in self.points])
            cost = ServiceTime(found.cost.a_s / self.calls, found.cost.b_s)
            known = replace(known, cost=cost, step_cost=found.step_cost)
            again = predict(self.scenario, self.config, known, self.first, self.top_k)
            busier = again.waited_rows / (again.num_tokens * self.top_k * self.hot)
            late_s = again.answers_s / again.num_steps
        return known

    def with_answers(self, known: Known, spread: Spread) -> Known:
        """With the time of an answer for which copies, simulated, help as much as they did; found by halving.

        What every call takes holds it, whatever its rows: so it cannot be more than that.
        """
        helped, cost = spread.kept.token_s / spread.calm.token_s, known.cost

        def with_answer(answer_s: float) -> Known:
            return replace(known, answer_s=answer_s, cost=replace(cost, a_s=cost.a_s - answer_s))

        low, high = 0.0, cost.a_s
        if self._helps(known, spread) >= helped:
            return known
        for _ in range(NUM_HALVED):
            middle = (low + high) / 2
            low, high = (low, middle) if self._helps(with_answer(middle), spread) >= helped else (middle, high)
        return self.refined(with_answer((low + high) / 2))

    def _helps(self, known: Known, spread: Spread) -> float:
        """Time of a token with the copies, by that without."""
        calm, kept = (
            steady(self.scenario, self.config, known, status, self.top_k) for status in (self.first, spread.status)
        )
        return (kept.duration_s / kept.num_tokens) / (calm.duration_s / calm.num_tokens)


def steady(
    scenario: Scenario, config: ClusterConfig, known: Known, status: ClusterStatus, top_k: int
) -> SimulationResult:
    """The last phase's load on the replicas in `status`, simulated for STEADY_S."""
    is_late_W = known.window_end_s > scenario.duration_s - scenario.phases[-1].duration_s
    late_1LE = known.weights_WLE[is_late_W if is_late_W.any() else slice(None)].mean(axis=0, keepdims=True)
    known = replace(known, window_end_s=np.array([STEADY_S]), weights_WLE=late_1LE)
    return predict(replace(scenario, phases=(last_phase(scenario, STEADY_S),)), config, known, status, top_k)


def _without(one: Measured, message_s: float, late_s: float) -> Measured:
    """Without what sending took, and without what a step waited for answers of servers that were done."""
    return replace(
        one,
        own_s=max(one.own_s - message_s * one.messages, LEAST_LEFT * one.own_s),
        wait_s=max(one.wait_s - late_s * one.steps, LEAST_LEFT * one.wait_s),
    )
