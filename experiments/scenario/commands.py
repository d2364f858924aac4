"""What `octavo experiment` does: reads a scenario, runs it under each policy and seed, writes the reports."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.command.added_commands import CommandError
from cluster.simulate import SimulationResult
from experiments.scenario.schema import Scenario, read_scenario
from experiments.scenario.simulated import run_simulated
from experiments.simulation.report import report_html, summary, table

Run = Callable[[str, int], SimulationResult]


def load_scenario(path: Path) -> Scenario:
    """The scenario in a file, whose name is its name where it has none. Raises CommandError of one line."""
    with told(str(path)):
        return read_scenario(path)


def check_text(path: Path, scenario: Scenario) -> str:
    """One line about a scenario that is sound."""
    return (
        f"{path}: {len(scenario.phases)} phases in {scenario.duration_s:g} s, {len(scenario.policies)} policies, "
        f"{len(scenario.faults)} faults, {len(scenario.seeds)} seeds"
    )


def run_scenario(scenario: Scenario, run: Run, where: str) -> dict[str, SimulationResult]:
    """Every policy with every seed, one JSON line each on stdout as it ends, the table on stderr."""
    results: dict[str, SimulationResult] = {}
    for policy in scenario.policies:
        for seed in scenario.seeds:
            label = policy if len(scenario.seeds) == 1 else f"{policy} #{seed}"
            print(f"{where} {label} ...", file=sys.stderr, flush=True)
            with told(scenario.name or "experiment"):
                results[label] = run(policy, seed)
            line = {"type": "run", "policy": policy, "seed": seed, "where": where, **summary(results[label])}
            print(json.dumps(line, allow_nan=False), flush=True)
    print(table(results), file=sys.stderr)
    return results


def simulated_run(scenario: Scenario) -> Run:
    """Runs on the virtual clock."""
    return lambda policy, seed: run_simulated(scenario, policy, seed)


@contextmanager
def live_run(scenario: Scenario, console: Console) -> Iterator[Run]:
    """Runs on a cluster of this machine; what can be refused is refused before anything starts."""
    from experiments.scenario.live import live_config
    from experiments.scenario.live import run_live as run

    model = _model(scenario, console)
    with told("experiment"):
        for policy in scenario.policies:
            live_config(scenario, model, policy)
    with _own_ray(scenario):
        yield lambda policy, seed: run(scenario, model, policy, seed, console)


def compare_worlds(scenario: Scenario, console: Console) -> None:
    """Measures the simulator's fidelity: a JSON line for the constants, and one for each phase that was predicted."""
    from experiments.scenario.fidelity import check, run_fidelity

    with told(scenario.name or "experiment"):
        check(scenario)
        model = _model(scenario, console)
        with _own_ray(scenario):
            constants, comparisons = run_fidelity(scenario, model, console)
    lines = {"cost": constants.cost, "step_cost": constants.step_cost}
    print(json.dumps({"type": "constants", **{name: asdict(one) for name, one in lines.items()}}), flush=True)
    for one in comparisons:
        told_of = one.to_json()
        print(json.dumps(told_of, allow_nan=False), flush=True)
        errors = {name: told_of[name]["error"] for name in ("output_throughput", "host_seconds")}
        said = ", ".join(f"{name} {'?' if error is None else f'{error:+.1%}'}" for name, error in errors.items())
        print(f"{_phase(asdict(one.phase))}: {said}", file=sys.stderr)


def _model(scenario: Scenario, console: Console) -> Path:
    from actors.command.demo_model import ensure_demo_model

    return Path(scenario.model.path) if scenario.model.path else ensure_demo_model(console=console)


def rank_policies(scenario: Scenario, console: Console) -> dict[str, SimulationResult]:
    """Each policy live, and the same requests simulated, once for each seed: a JSON line for the constants, for each
    policy, and in the end for the order by medians.

    Returns both worlds' results, for the report.
    """
    from experiments.scenario import ranking

    rounds: list[ranking.Round] = []
    with told(scenario.name or "experiment"):
        ranking.check(scenario)
        model = _model(scenario, console)
        with _own_ray(scenario):
            for one in ranking.rounds(scenario, model, console):
                rounds.append(one)
                for line in one.lines:
                    print(json.dumps(line, allow_nan=False), flush=True)
    results = {name: result for one in rounds for name, result in one.results.items()}
    line, text = ranking.rank(rounds)
    print(json.dumps(line, allow_nan=False), flush=True)
    print(table(results), file=sys.stderr)
    print(text, file=sys.stderr)
    return results


@contextmanager
def _own_ray(scenario: Scenario) -> Iterator[None]:
    """A Ray of as many nodes as are asked for, which ends with the block."""
    from actors import ray_runtime
    from experiments.scenario.live import join_ray
    from experiments.scenario.nodes import NUM_DEVICES, more_nodes

    live = scenario.live
    devices = NUM_DEVICES if live.own_devices else 1
    join_ray(devices if live.nodes > 1 else None)
    try:
        with more_nodes(live.nodes - 1, devices):
            yield
    finally:
        ray_runtime.disconnect()


def write_report(path: Path, scenario: Scenario, where: str, results: dict[str, SimulationResult]) -> None:
    """The HTML page."""
    title = f"{scenario.name or 'Experiment'}, {where}"
    facts: dict[str, Any] = {
        "phases": " then ".join(_phase(one) for one in asdict(scenario)["phases"]),
        "faults": ", ".join(f"{f.kind} expert {f.expert} at {f.at_s:g} s" for f in scenario.faults) or "none",
        "hosts": scenario.hosts.count if where == "simulated" else "expert processes",
        "seeds": ", ".join(map(str, scenario.seeds)),
    }
    with told(str(path)):
        path.write_text(report_html(title, facts, results))


def _phase(phase: dict[str, Any]) -> str:
    load = f"{phase['concurrency']} at once" if phase["concurrency"] else f"{phase['rate']:g}/s"
    to = f" to {phase['rate_to']:g}/s" if phase["rate_to"] else ""
    text = "+".join(f"{weight:g} {kind}" for kind, weight in phase["text"].items())
    return f"{phase['duration_s']:g} s of {load}{to} ({text})"


@contextmanager
def told(what: str) -> Iterator[None]:
    """What a person can mend, as one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise CommandError(f"{what}: {error}") from error
