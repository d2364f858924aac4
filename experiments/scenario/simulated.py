"""A scenario on the virtual clock: its hosts, policies and faults as `cluster.simulate` takes them."""

import math

from cluster.autoscale import Autoscaled
from cluster.ids import NodeId
from cluster.layout import Grain, Host
from cluster.policies import policy_named
from cluster.policy import Policy
from cluster.service_time import ServiceTime
from cluster.simulate import SimulationConfig, SimulationResult, simulate
from cluster.simulated_cluster import SimulatedFault
from experiments.scenario.load import trace_of
from experiments.scenario.schema import Fault, Scenario


def run_simulated(scenario: Scenario, policy: str, seed: int) -> SimulationResult:
    """One policy, one seed. Raises ValueError for what does not fit together."""
    trace, closed = trace_of(scenario, seed)
    model, on, cost = scenario.model, scenario.hosts, scenario.cost
    grain = Grain.even(
        model.layers, model.experts, num_ranges=min(on.ranges, model.layers), layer_bytes=int(model.layer_mb * 1e6)
    )
    slots = math.floor(on.columns * grain.num_ranges + 1e-9)
    memory = math.ceil(slots * float(grain.bytes_U.max()))
    hosts = tuple(Host(node_id=NodeId(f"host-{i}"), slots=slots, memory_bytes=memory) for i in range(on.count))
    config = SimulationConfig(
        cost=ServiceTime(cost.call_us * 1e-6, cost.token_us * 1e-6),
        step_cost=ServiceTime(cost.step_us * 1e-6, cost.step_token_us * 1e-6),
        max_num_seqs=scenario.max_num_seqs,
        max_num_batched_tokens=scenario.max_num_batched_tokens,
        window_s=on.window_s,
        load_bytes_per_s=on.load_gb_s * 1e9,
        host_start_s=on.start_s,
        locality_s=min(10.0, scenario.duration_s / 10),
        closed=closed,
        faults=tuple(_struck(fault, grain) for fault in scenario.faults),
    )
    made = policy_of(scenario, policy)
    return simulate(trace, made, grain=grain, hosts=hosts, template=hosts[0], config=config)


def policy_of(scenario: Scenario, name: str) -> Policy:
    """The policy; with hosts that follow the load where the scenario says so, but for static."""
    policy = policy_named(name, budget_bytes=int(scenario.hosts.budget_gb * 1e9))
    scale = scenario.hosts.autoscale
    if scale is None or name == "static":
        return policy
    return Autoscaled(
        inner=policy,
        min_hosts=scale.min,
        max_hosts=scale.max,
        target_share=scale.target_share,
        target_step_s=None if scale.target_step_ms is None else scale.target_step_ms / 1e3,
        lead_s=scenario.hosts.start_s,
    )


def _struck(fault: Fault, grain: Grain) -> SimulatedFault:
    factor = math.inf if fault.kind == "kill" else fault.factor
    return SimulatedFault(at_s=fault.at_s, unit=grain.unit(0, fault.expert), factor=factor, for_s=fault.for_s)
