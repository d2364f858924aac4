"""How near the simulator comes to the live cluster: some phases calibrate it, the others are predicted and compared.

All phases run on one live cluster, one after another, each until its last answer; the simulator gets the same
requests, the constants fitted to the first phases, and the popularity of experts that was seen in them.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cluster.ids import NodeId
from cluster.layout import Grain, Host
from cluster.reactive import static
from cluster.routing_trace import RoutingTrace
from cluster.simulate import SimulationConfig, SimulationResult, simulate
from experiments.scenario.calibration import Calibration, Measured, calibrate, drawing_weights, measured
from experiments.scenario.live import live_config, with_cluster
from experiments.scenario.live_run import LiveCluster
from experiments.scenario.load import PhaseLoad, closed_loops, phase_loads
from experiments.scenario.schema import Phase, Scenario, ScenarioError
from experiments.simulation.report import summary
from experiments.simulation.synthetic_routing import RoutingModel, route
from model.storage.config_reader import read_config

NUM_ROUTED = 5000
NUM_REFINED = 2  # times that the phases which calibrate are simulated: which rows steps wait for hardly depends on cost


@dataclass(frozen=True, slots=True)
class Comparison:
    """One phase that was predicted: figures of both worlds."""

    phase: Phase
    live: SimulationResult
    simulated: SimulationResult

    def to_json(self) -> dict[str, Any]:
        """Errors are (simulated - live) / live."""
        live, simulated = summary(self.live), summary(self.simulated)

        def both(name: str) -> dict[str, Any]:
            is_known = live[name] and simulated[name] is not None
            error = (simulated[name] - live[name]) / live[name] if is_known else None
            return {"live": live[name], "simulated": simulated[name], "error": error}

        load = {"concurrency": self.phase.concurrency, "rate": self.phase.rate}
        names = ("output_throughput", "host_seconds", "p50_ttft_s", "p50_tpot_s", "p50_e2el_s", "p99_e2el_s")
        return {"type": "fidelity", **load, **{name: both(name) for name in names}}


def run_fidelity(scenario: Scenario, model: Path, console: Console) -> tuple[Calibration, list[Comparison]]:
    """Runs everything. Ray must have been joined. Raises ScenarioError where nothing is left to predict."""
    check(scenario)
    top_k = read_config(model).top_k
    config = live_config(scenario, model, "static")

    async def play(cluster: LiveCluster) -> tuple[Calibration, list[Comparison]]:
        return await compare(cluster, scenario, top_k=top_k, replicas=config.replicas)

    return with_cluster(scenario, config, model, console, play)


async def compare(
    cluster: LiveCluster, scenario: Scenario, *, top_k: int, replicas: int
) -> tuple[Calibration, list[Comparison]]:
    """The phases on a cluster that runs, each until its last answer, and the later ones beside their predictions."""
    seed, num = scenario.seeds[0], scenario.live.calibrate
    loads = [replace(load, begin_s=0.0) for load in phase_loads(scenario, seed)]
    points, results = [], []
    for load in loads:
        before = await cluster.client.snapshot()
        results.append(await cluster.run(scenario, [load]))
        # Clients that wait for their answers leave nothing between first and last that has nothing to do.
        busy_s = results[-1].duration_s if load.phase.concurrency else 0.0
        points.append(measured(before, await cluster.client.snapshot(), busy_s))

    def simulated(load: PhaseLoad, constants: Calibration) -> SimulationResult:
        return predict(scenario, load, constants, top_k, replicas, seed)

    constants = refined(loads[:num], points[:num], top_k, simulated)
    return constants, [
        Comparison(load.phase, result, simulated(load, constants))
        for load, result in itertools.islice(zip(loads, results, strict=True), num, None)
    ]


def refined(
    loads: Sequence[PhaseLoad],
    points: Sequence[Measured],
    top_k: int,
    simulated: Callable[[PhaseLoad, Calibration], SimulationResult],
) -> Calibration:
    """The constants with which the phases that were measured, simulated, take as long as they did."""
    constants = calibrate(points, top_k)
    for _ in range(NUM_REFINED):
        again = [simulated(load, constants) for load in loads]
        constants = calibrate(points, top_k, [result.waited_rows / max(result.num_steps, 1) for result in again])
    return constants


def check(scenario: Scenario) -> None:
    """Refuses what cannot be compared."""
    if scenario.live.calibrate >= len(scenario.phases):
        raise ScenarioError(f"live.calibrate is {scenario.live.calibrate}, but it must leave a phase to predict")
    if scenario.faults:
        raise ScenarioError("faults are given, but fidelity is measured without them")


def predict(
    scenario: Scenario, load: PhaseLoad, constants: Calibration, top_k: int, replicas: int, seed: int
) -> SimulationResult:
    """The phase on the virtual clock, one expert process a host."""
    num_layers, num_experts = constants.popularity_LE.shape
    grain = Grain.even(num_layers, num_experts)
    hosts = tuple(
        Host(node_id=NodeId(f"process-{i}"), slots=1, memory_bytes=1 << 50) for i in range(num_experts * replicas)
    )
    config = SimulationConfig(
        cost=constants.cost,
        step_cost=constants.step_cost,
        max_num_seqs=scenario.max_num_seqs,
        max_num_batched_tokens=scenario.max_num_batched_tokens,
        window_s=scenario.hosts.window_s,
        locality_s=load.phase.duration_s,
        closed=closed_loops([load]),
    )
    trace = _trace(load, constants, top_k, seed)
    return simulate(trace, static, grain=grain, hosts=hosts, template=hosts[0], config=config)


def _trace(load: PhaseLoad, constants: Calibration, top_k: int, seed: int) -> RoutingTrace:
    num_layers, num_experts = constants.popularity_LE.shape
    model = RoutingModel(num_layers=num_layers, num_experts=num_experts, top_k=top_k, stickiness=0.0)
    times = np.linspace(0.0, load.phase.duration_s, NUM_ROUTED)
    popularity_LE = drawing_weights(constants.popularity_LE, top_k)

    def popularity(at: Sequence[float]) -> Any:
        return np.broadcast_to(popularity_LE, (len(at), num_layers, num_experts))

    return RoutingTrace(
        num_experts=num_experts,
        arrival_s=load.arrival_s,
        prompt_tokens=load.prompt_tokens,
        output_tokens=load.output_tokens,
        token_time_s=times,
        token_request=np.full(len(times), -1, np.int32),
        experts=route(model, np.random.default_rng([seed, 3]), times, popularity),  # type: ignore[arg-type]
    )
