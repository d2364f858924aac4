"""Policy against policy in both worlds: each runs live, the same requests are simulated, and the orders are compared.

The first policy's live run tells the simulator's constants and which experts were asked for when; every policy then
begins from the placement that it found live. A host is a Ray node, whose experts wait for each other (`live.row_us`).
L layers, E experts, N hosts.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from actors.supervision.asking import load_policy
from actors.supervision.status import ClusterStatus
from cluster.config import ClusterConfig
from cluster.ids import NodeId
from cluster.layout import FloatArray, Grain, Host
from cluster.policy import Action, Copy, Observation, Policy
from cluster.routing_trace import RoutingTrace
from cluster.service_time import ServiceTime
from cluster.simulate import SimulationConfig, SimulationResult, simulate
from experiments.scenario.calibration import Measured, calibrate, drawing_weights, measured
from experiments.scenario.live import LiveCluster, LiveRun, live_config, with_cluster
from experiments.scenario.load import PhaseLoad, closed_loops, phase_loads
from experiments.scenario.schema import Scenario, ScenarioError
from experiments.simulation.synthetic_routing import RoutingModel, route
from model.storage.config_reader import read_config
from protos.coordinator_pb2 import SnapshotReply

NUM_ROUTED = 5000
CLEAR = 0.05
"""Two policies whose throughput differs by less are not said to be in any order."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One policy's live run: its result, the coordinator's counters at the ends of windows, and how it all began."""

    result: SimulationResult
    snapshots: tuple[tuple[float, SnapshotReply], ...]
    first: ClusterStatus


@dataclass(frozen=True, slots=True)
class Ranked:
    """JSON lines, both worlds' results by name, and the orders in words."""

    lines: tuple[dict[str, Any], ...]
    results: dict[str, SimulationResult]
    text: str


@dataclass(frozen=True, slots=True)
class Known:
    """What the first run told: constants, where each expert was, rows by layer and expert in each window."""

    cost: ServiceTime
    step_cost: ServiceTime
    places: tuple[tuple[int, NodeId], ...]
    window_end_s: FloatArray
    weights_WLE: FloatArray


def check(scenario: Scenario) -> None:
    """Refuses what cannot be compared."""
    if len(scenario.policies) < 2 or len(set(scenario.policies)) != len(scenario.policies):
        raise ScenarioError("policies must have at least two different ones to be ranked")
    if scenario.policies[0] != "static":
        raise ScenarioError(f"policies[0] is {scenario.policies[0]!r}, but it must be static: it tells the constants")
    if scenario.live.calibrate >= len(scenario.phases):
        raise ScenarioError(f"live.calibrate is {scenario.live.calibrate}, but it must leave a phase to compare")
    if scenario.faults:
        raise ScenarioError("faults are given, but policies are ranked without them")


def record_all(scenario: Scenario, model: Path, console: Console) -> dict[str, Recorded]:
    """Every policy on a cluster of its own. Ray must have been joined."""

    async def play(cluster: LiveCluster) -> Recorded:
        run = LiveRun(cluster.client, cluster.texts, cluster.status)
        first = await cluster.status()
        result = await run.run(scenario, phase_loads(scenario, scenario.seeds[0]))
        return Recorded(result, tuple(run.snapshots), first)

    recorded = {}
    for policy in scenario.policies:
        console.print(f"live {policy} ...", markup=False)
        config = live_config(scenario, model, policy)
        row_us = scenario.live.row_us
        recorded[policy] = with_cluster(config, model, scenario.seeds[0], console, play, row_us=row_us)
    return recorded


def compare(scenario: Scenario, model: Path, recorded: dict[str, Recorded]) -> Ranked:
    """Simulates every policy on what the first one's run told, and puts figure beside figure."""
    top_k = read_config(model).top_k
    known = learn(recorded[scenario.policies[0]], top_k)
    since_s = sum(phase.duration_s for phase in scenario.phases[: scenario.live.calibrate])
    lines: list[dict[str, Any]] = [
        {
            "type": "constants",
            "call_us": known.cost.a_s * 1e6,
            "token_us": known.cost.b_s * 1e6,
            "step_us": known.step_cost.a_s * 1e6,
            "step_token_us": known.step_cost.b_s * 1e6,
        }
    ]
    results: dict[str, SimulationResult] = {}
    rates: dict[str, tuple[float, float]] = {}
    for policy, run in recorded.items():
        predicted = predict(scenario, live_config(scenario, model, policy), known, run.first, top_k)
        live = _figures(run.result, since_s, scenario.duration_s)
        simulated = _figures(predicted, since_s, scenario.duration_s, rows_per_token=top_k)
        errors = {name: simulated[name] / live[name] - 1 if live[name] else None for name in live}
        lines.append({"type": "policy", "policy": policy, "live": live, "simulated": simulated, "error": errors})
        results |= {f"{policy} live": run.result, f"{policy} simulated": predicted}
        rates[policy] = live["tokens_per_s"], simulated["tokens_per_s"]
    orders = [_by_rate({policy: both[world] for policy, both in rates.items()}) for world in (0, 1)]
    against = [f"{one} and {other}" for one, other in combinations(rates, 2) if _disagree(rates[one], rates[other])]
    lines.append({"type": "ranking", "live": orders[0], "simulated": orders[1], "disagree": against})
    text = "\n".join(f"{name}: {' > '.join(order)}" for name, order in zip(("live", "simulated"), orders, strict=True))
    return Ranked(tuple(lines), results, f"{text}\nclearly in another order: {', '.join(against) or 'none'}")


def learn(run: Recorded, top_k: int) -> Known:
    """From a run in which nothing moved. Raises ValueError where no window had a step, or a node holds nothing."""
    places = tuple(
        (expert, NodeId(one.node)) for one in run.first.replicas for expert in one.expert_ids if one.state == "ready"
    )
    names = sorted({node for _, node in places})
    windows = [
        (at_s, measured(before, now))
        for (_, before), (at_s, now) in pairwise(run.snapshots)
        if now.steps_total > before.steps_total
    ]
    if not windows or not names:
        raise ValueError("nothing was served in the first policy's run")
    num_experts = windows[0][1].load_LE.shape[1]
    on_EN = np.zeros((num_experts, len(names)))
    for expert, node in places:
        on_EN[expert, names.index(node)] = 1.0
    found = calibrate([_by_host(one, on_EN) for _, one in windows], top_k)
    rows_N = sum(one.load_LE.sum(axis=0) for _, one in windows) @ on_EN
    calls = float(on_EN[:, int(rows_N.argmax())].sum())  # of the host that is waited for
    shares_WLE = np.stack([one.load_LE / np.maximum(one.load_LE.sum(axis=1, keepdims=True), 1) for _, one in windows])
    return Known(
        cost=ServiceTime(found.cost.a_s / calls, found.cost.b_s),
        step_cost=found.step_cost,
        places=places,
        window_end_s=np.array([at_s for at_s, _ in windows]),
        weights_WLE=np.stack([drawing_weights(shares_LE, top_k) for shares_LE in shares_WLE]),
    )


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
    hosts = tuple(Host(node_id=name, slots=slots, memory_bytes=1 << 50) for name in names)
    loads = phase_loads(scenario, scenario.seeds[0])
    column_bytes = grain.layer_bytes * num_layers
    simulated = SimulationConfig(
        cost=known.cost,
        step_cost=known.step_cost,
        max_num_seqs=scenario.max_num_seqs,
        max_num_batched_tokens=scenario.max_num_batched_tokens,
        window_s=config.balance_interval_s,
        load_bytes_per_s=column_bytes / scenario.live.copy_s,
        max_loading=1,
        loading_slows=scenario.live.copy_slows,
        locality_s=min(5.0, scenario.duration_s / 10),
        closed=closed_loops(loads),
    )
    began = {(expert, NodeId(one.node)) for one in first.replicas if one.state == "ready" for expert in one.expert_ids}
    moving = load_policy(config, grain) if config.balance == "on" else _nothing
    policy = beginning_with(began, moving)
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


def _nothing(_seen: Observation, state: Any) -> tuple[tuple[Action, ...], Any]:
    """What a live cluster does without balancing."""
    return (), state


def _by_host(one: Measured, on_EN: FloatArray) -> Measured:
    """The same with hosts for experts: a layer waits for its busiest host."""
    return replace(one, load_LE=one.load_LE @ on_EN)


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


def _figures(result: SimulationResult, since_s: float, until_s: float, rows_per_token: int = 1) -> dict[str, float]:
    """Of the phases that are compared: tokens a second, and seconds of copies of experts (a process each, live)."""
    line = result.timeline
    edges = [0.0, *line.at_s]
    tokens = seconds = copy_seconds = 0.0
    for (began_s, at_s), num, copies in zip(pairwise(edges), line.tokens, line.copies, strict=True):
        if since_s <= began_s and at_s <= until_s + (at_s - began_s) / 2:
            tokens += num / rows_per_token
            seconds += at_s - began_s
            copy_seconds += copies * (at_s - began_s)
    return {"tokens_per_s": tokens / max(seconds, 1e-9), "copy_seconds_per_s": copy_seconds / max(seconds, 1e-9)}


def _by_rate(rates: dict[str, float]) -> list[str]:
    return sorted(rates, key=lambda policy: -rates[policy])


def _disagree(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """True where both worlds have a clear order of the two, and not the same."""
    live, simulated = (a / max(b, 1e-9) - 1 for a, b in zip(one, other, strict=True))
    return min(abs(live), abs(simulated)) > CLEAR and (live > 0) != (simulated > 0)
