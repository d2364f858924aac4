"""What the simulator says of a policy with what `learning` made of a live run.

A host is a Ray node. L layers, E experts, W windows.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
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
from experiments.scenario.copying import CopyCost
from experiments.scenario.load import PhaseLoad, closed_loops, phase_loads
from experiments.scenario.nodes import NUM_DEVICES
from experiments.scenario.schema import Scenario
from experiments.simulation.synthetic_routing import RoutingModel, route

NUM_ROUTED = 5000


@dataclass(frozen=True, slots=True)
class Known:
    """What the first run told: constants, where each expert was, rows by layer and expert in each window.

    `message_s` and `answer_s` as in `SimulationConfig`.
    """

    cost: ServiceTime
    step_cost: ServiceTime
    message_s: float
    answer_s: float
    copy: CopyCost
    places: tuple[tuple[int, NodeId], ...]
    window_end_s: FloatArray
    weights_WLE: FloatArray


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
        message_s=known.message_s,
        answer_s=known.answer_s,
        max_num_seqs=scenario.max_num_seqs,
        max_num_batched_tokens=scenario.max_num_batched_tokens,
        window_s=config.balance_interval_s,
        num_windows=WINDOW_INTERVALS,
        load_bytes_per_s=column_bytes / known.copy.seconds,
        load_factors=tuple(took_s / known.copy.seconds for took_s in known.copy.took_s),
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
