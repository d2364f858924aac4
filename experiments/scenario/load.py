"""The requests and, simulated, the routing of a scenario's phases, all from its seed. Sending them is not done here."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.routing_trace import RoutingTrace
from cluster.simulated_engine import ClosedLoop
from experiments.scenario.schema import Phase, Scenario, ScenarioError
from experiments.simulation.synthetic_routing import MAX_CHOICES, RoutingModel, route

MAX_REQUESTS = 200_000
MAX_ROUTED = 20_000
MIN_REQUEST_S = 0.02  # of a closed loop's client: more requests than it can send are not made

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class PhaseLoad:
    """One phase's requests in order: seconds after the phase began (0 in a closed loop), lengths, seed of the text."""

    begin_s: float
    phase: Phase
    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray


def phase_loads(scenario: Scenario, seed: int) -> list[PhaseLoad]:
    """The phases' requests. Raises ScenarioError where they are too many."""
    rng = np.random.default_rng([seed, 1])
    loads, begin_s = [], 0.0
    for index, phase in enumerate(scenario.phases):
        if phase.concurrency is not None:
            most = int(phase.concurrency * max(phase.duration_s / MIN_REQUEST_S, 1))
            arrival_s = np.zeros(min(most, MAX_REQUESTS // len(scenario.phases)))
        else:
            arrival_s = _poisson(rng, phase, index)
        lengths = [
            np.clip(rng.geometric(1 / mean, len(arrival_s)), 1, 8 * mean).astype(np.int32)
            for mean in (phase.prompt_tokens, phase.output_tokens)
        ]
        loads.append(PhaseLoad(begin_s, phase, arrival_s, *lengths))
        begin_s += phase.duration_s
    return loads


def _poisson(rng: np.random.Generator, phase: Phase, index: int) -> FloatArray:
    assert phase.rate is not None, "checked by the schema"
    first, last = phase.rate, phase.rate if phase.rate_to is None else phase.rate_to
    high = max(first, last)
    if high * phase.duration_s > MAX_REQUESTS:
        raise ScenarioError(f"phases[{index}] has more than {MAX_REQUESTS} requests")
    times = np.sort(rng.uniform(0, phase.duration_s, rng.poisson(high * phase.duration_s)))
    rate = first + (last - first) * times / phase.duration_s
    kept: FloatArray = times[rng.random(len(times)) < rate / high]
    return kept


def closed_loops(loads: Sequence[PhaseLoad]) -> tuple[ClosedLoop, ...]:
    """Which of all these requests are of clients that wait for their answers."""
    closed, count = [], 0
    for load in loads:
        if load.phase.concurrency is not None:
            end_s = load.begin_s + load.phase.duration_s
            closed.append(ClosedLoop(count, count + len(load.arrival_s), load.phase.concurrency, end_s))
        count += len(load.arrival_s)
    return tuple(closed)


def trace_of(scenario: Scenario, seed: int) -> tuple[RoutingTrace, tuple[ClosedLoop, ...]]:
    """The phases as a trace of requests and routing, and which of the requests are of closed loops."""
    loads = phase_loads(scenario, seed)
    closed = closed_loops(loads)
    if not any(len(load.arrival_s) for load in loads):
        raise ScenarioError("no phase has a request: a rate or a duration_s is too small")
    shape = scenario.model
    num_tokens = min(MAX_ROUTED, MAX_CHOICES // (shape.layers * shape.experts))
    times = np.linspace(0.0, scenario.duration_s, num_tokens)
    model = RoutingModel(
        num_layers=shape.layers,
        num_experts=shape.experts,
        top_k=shape.top_k,
        law=shape.law,
        skew=shape.skew,
        stickiness=shape.stickiness,
    )
    experts = route(model, np.random.default_rng([seed, 2]), times, _popularity(scenario, model, seed))
    trace = RoutingTrace(
        num_experts=shape.experts,
        arrival_s=np.concatenate([load.begin_s + load.arrival_s for load in loads]),
        prompt_tokens=np.concatenate([load.prompt_tokens for load in loads]),
        output_tokens=np.concatenate([load.output_tokens for load in loads]),
        token_time_s=times,
        token_request=np.full(num_tokens, -1, np.int32),
        experts=experts,
    )
    return trace, closed


class _popularity:  # noqa: N801 - used as a function
    """Popularity at some times: each kind of text has one of its own, a phase mixes them by its weights."""

    def __init__(self, scenario: Scenario, model: RoutingModel, seed: int) -> None:
        kinds = sorted({kind for phase in scenario.phases for kind in phase.text})
        drawn = {k: model.popularity(np.random.default_rng([seed, zlib.crc32(k.encode())])) for k in kinds}
        self._ends = np.cumsum([phase.duration_s for phase in scenario.phases])
        self._mixed_PLE = np.stack(
            [sum(w * drawn[k] for k, w in p.text.items()) / sum(p.text.values()) for p in scenario.phases]
        )

    def __call__(self, times_T: FloatArray) -> FloatArray:
        which_T = np.minimum(np.searchsorted(self._ends, times_T, side="right"), len(self._ends) - 1)
        popularity_TLE: FloatArray = self._mixed_PLE[which_T]
        return popularity_TLE
