"""What one live run tells the simulator, and what it then says of a policy.

A host is a Ray node; whom a step waits for is its busiest node, or its busiest expert where each has a device of its
own. Those of single steps have more rows than those of a mean step: the run that told the constants is simulated too,
and they are fitted again (`experiments.scenario.calibration`). L layers, E experts, N hosts or experts, W windows.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from actors.supervision.asking import WINDOW_INTERVALS, budget_bytes, load_policy
from actors.supervision.status import ClusterStatus
from cluster.config import ClusterConfig
from cluster.ids import NodeId
from cluster.layout import FloatArray, Grain, Host
from cluster.policy import Action, Copy, Observation, Policy
from cluster.policy_check import within_bounds
from cluster.routing_trace import RoutingTrace
from cluster.service_time import ServiceTime
from cluster.simulate import SimulationConfig, SimulationResult, simulate
from experiments.scenario.calibration import calibrate, drawing_weights, measured
from experiments.scenario.copying import CopyCost
from experiments.scenario.load import PhaseLoad, closed_loops, phase_loads
from experiments.scenario.nodes import NUM_DEVICES
from experiments.scenario.schema import Scenario
from experiments.simulation.synthetic_routing import RoutingModel, route
from protos.coordinator_pb2 import SnapshotReply

NUM_ROUTED = 5000
NUM_REFINED = 2  # as in `experiments.scenario.fidelity`


@dataclass(frozen=True, slots=True)
class Recorded:
    """One policy's live run: its result, the coordinator's counters at the ends of windows, and how it all began.

    `copy` was measured after the first policy's.
    """

    result: SimulationResult
    snapshots: tuple[tuple[float, SnapshotReply], ...]
    first: ClusterStatus
    copy: CopyCost | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """What the first run told: constants, where each expert was, rows by layer and expert in each window."""

    cost: ServiceTime
    step_cost: ServiceTime
    copy: CopyCost
    places: tuple[tuple[int, NodeId], ...]
    window_end_s: FloatArray
    weights_WLE: FloatArray


def learn(scenario: Scenario, config: ClusterConfig, run: Recorded, top_k: int) -> Known:
    """From a run with `copy` in which nothing moved. Raises ValueError where nothing was served."""
    places = tuple(
        (expert, NodeId(one.node)) for one in run.first.replicas for expert in one.expert_ids if one.state == "ready"
    )
    names = sorted({node for _, node in places})
    windows = [
        (at_s, measured(before, now, _busy_s(scenario, began_s, at_s)))
        for (began_s, before), (at_s, now) in pairwise(run.snapshots)
        if now.steps_total > before.steps_total
    ]
    if not windows or not names or run.copy is None:
        raise ValueError("nothing was served in the first policy's run")
    num_experts = windows[0][1].load_LE.shape[1]
    on_EN = np.zeros((num_experts, len(names)))
    for expert, node in places:
        on_EN[expert, names.index(node)] = 1.0
    if scenario.live.own_devices:
        on_EN = np.eye(num_experts)
    points = [replace(one, load_LE=one.load_LE @ on_EN) for _, one in windows]
    loads_LN: FloatArray = np.sum([one.load_LE for one in points], axis=0)
    calls = float(on_EN[:, int(loads_LN.sum(axis=0).argmax())].sum())  # of who is waited for
    shares_WLE = np.stack([one.load_LE / np.maximum(one.load_LE.sum(axis=1, keepdims=True), 1) for _, one in windows])
    known = Known(
        cost=ServiceTime(0.0, 0.0),
        step_cost=ServiceTime(0.0, 0.0),
        copy=run.copy,
        places=places,
        window_end_s=np.array([at_s for at_s, _ in windows]),
        weights_WLE=np.stack([drawing_weights(shares_LE, top_k) for shares_LE in shares_WLE]),
    )
    hot = float((loads_LN.max(axis=1) / np.maximum(loads_LN.sum(axis=1), 1)).sum())  # rows waited for, of one a layer
    busier = 1.0
    for _ in range(1 + NUM_REFINED):
        found = calibrate(points, top_k, [busier * one.busiest for one in points])
        cost = ServiceTime(found.cost.a_s / calls, found.cost.b_s)
        known = replace(known, cost=cost, step_cost=found.step_cost)
        again = predict(scenario, config, known, run.first, top_k)
        busier = again.waited_rows / (again.num_tokens * top_k * hot)
    return known


def _busy_s(scenario: Scenario, began_s: float, at_s: float) -> float:
    """All of that time where clients that wait for their answers always left something to do, else 0."""
    ends_s = np.cumsum([phase.duration_s for phase in scenario.phases])
    first, last = np.searchsorted(ends_s, [began_s, at_s])
    waiting = last < len(ends_s) and all(phase.concurrency for phase in scenario.phases[first : last + 1])
    return at_s - began_s if waiting else 0.0


def predict(
    scenario: Scenario, config: ClusterConfig, known: Known, first: ClusterStatus, top_k: int
) -> SimulationResult:
    """The policy on the virtual clock, from the placement in `first` on."""
    num_layers, num_experts = known.weights_WLE.shape[1:]
    sizes = [one.weight_bytes / max(len(one.expert_ids) * num_layers, 1) for one in first.replicas]
    grain = Grain.even(
        num_layers, num_experts, num_ranges=config.balance_layer_ranges, layer_bytes=max(int(np.mean(sizes)), 1)
    )
    names = sorted({NodeId(one.node) for one in first.replicas} | {node for _, node in known.places})
    slots = grain.num_units if config.expert_slots is None else config.expert_slots
    devices = NUM_DEVICES if scenario.live.own_devices else 1
    hosts = tuple(Host(node_id=name, slots=slots, memory_bytes=1 << 50, parallelism=devices) for name in names)
    loads = phase_loads(scenario, scenario.seeds[0])
    column_bytes = grain.layer_bytes * num_layers
    simulated = SimulationConfig(
        cost=known.cost,
        step_cost=known.step_cost,
        max_num_seqs=scenario.max_num_seqs,
        max_num_batched_tokens=scenario.max_num_batched_tokens,
        window_s=config.balance_interval_s,
        num_windows=WINDOW_INTERVALS,
        load_bytes_per_s=column_bytes / known.copy.seconds,
        max_loading=1,
        apart=True,
        loading_slows=known.copy.slows,
        locality_s=min(5.0, scenario.duration_s / 10),
        closed=closed_loops(loads),
    )
    began = {(expert, NodeId(one.node)) for one in first.replicas if one.state == "ready" for expert in one.expert_ids}
    policy = beginning_with(began, as_live(config, grain) if config.balance == "on" else _nothing)
    trace = _trace(loads, known, top_k, scenario)
    return simulate(trace, policy, grain=grain, hosts=hosts, template=hosts[0], config=simulated)


def beginning_with(began: Collection[tuple[int, NodeId]], policy: Policy) -> Policy:
    """The policy, but for the first placement: that is as it was found."""

    def asked(seen: Observation, state: Any) -> tuple[tuple[Action, ...], Any]:
        if seen.layout.held_UN.any():
            return policy(seen, state)
        grain = seen.layout.grain
        units = range(grain.num_units)
        return tuple(
            Copy(unit=unit, node_id=node, source=None, num_bytes=int(grain.bytes_U[unit]), reason="found there")
            for unit in units
            for expert, node in sorted(began)
            if grain.expert(unit) == expert
        ), state

    return asked


def as_live(config: ClusterConfig, grain: Grain) -> Policy:
    """The configured policy, of whose actions no more are done at a time than live."""
    policy, budget = load_policy(config, grain), budget_bytes(config, grain)
    min_copies = config.replicas

    def asked(seen: Observation, state: Any) -> tuple[tuple[Action, ...], Any]:
        actions, state = policy(seen, state)
        return within_bounds(actions, seen.layout, budget_bytes=budget, min_copies=min_copies), state

    return asked


def _nothing(_seen: Observation, state: Any) -> tuple[tuple[Action, ...], Any]:
    """What a live cluster does without balancing."""
    return (), state


def _trace(loads: Sequence[PhaseLoad], known: Known, top_k: int, scenario: Scenario) -> RoutingTrace:
    """All requests, and routing as popular as each window's was."""
    _, num_layers, num_experts = known.weights_WLE.shape
    times = np.linspace(0.0, scenario.duration_s, NUM_ROUTED)

    def popularity(at: FloatArray) -> FloatArray:
        which = np.minimum(np.searchsorted(known.window_end_s, at), len(known.window_end_s) - 1)
        found: FloatArray = known.weights_WLE[which]
        return found

    model = RoutingModel(num_layers=num_layers, num_experts=num_experts, top_k=top_k, stickiness=0.0)
    return RoutingTrace(
        num_experts=num_experts,
        arrival_s=np.concatenate([load.begin_s + load.arrival_s for load in loads]),
        prompt_tokens=np.concatenate([load.prompt_tokens for load in loads]),
        output_tokens=np.concatenate([load.output_tokens for load in loads]),
        token_time_s=times,
        token_request=np.full(len(times), -1, np.int32),
        experts=route(model, np.random.default_rng([scenario.seeds[0], 4]), times, popularity),
    )
