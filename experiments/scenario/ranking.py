"""Policy against policy in both worlds: each runs live, the same requests are simulated, and the orders are compared.

The first policy's live run tells the simulator's constants and which experts were asked for when, and after its phases
what copies cost and bring; every policy then begins from the placement that it found live. Every seed of the scenario
is a round of its own, and what is compared in the end are medians: a machine is not the same from minute to minute.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from cluster.simulate import SimulationResult
from experiments.scenario.copying import copy_cost
from experiments.scenario.learning import Recorded, learn
from experiments.scenario.live import live_config, with_cluster
from experiments.scenario.live_run import LiveCluster, LiveRun
from experiments.scenario.load import phase_loads
from experiments.scenario.prediction import Known, predict
from experiments.scenario.schema import Scenario, ScenarioError
from experiments.scenario.spreading import spread
from model.storage.config_reader import read_config

CLEAR = 0.05
"""Two policies whose throughput differs by less are not said to be in any order."""


Figures = dict[str, float]
"""Of the phases that are compared, by name."""


@dataclass(frozen=True, slots=True)
class Round:
    """Every policy once in both worlds, with one seed: JSON lines, figures (live, simulated), and results by name."""

    seed: int
    lines: tuple[dict[str, Any], ...]
    figures: dict[str, tuple[Figures, Figures]]
    results: dict[str, SimulationResult]


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


def rounds(scenario: Scenario, model: Path, console: Console) -> Iterator[Round]:
    """One for each seed. Ray must have been joined."""
    for seed in scenario.seeds:
        once = replace(scenario, seeds=(seed,))
        yield compare(once, model, record(once, model, console))


def record(scenario: Scenario, model: Path, console: Console) -> dict[str, Recorded]:
    """Every policy live, with the first seed, on a cluster of its own."""
    recorded: dict[str, Recorded] = {}

    async def play(cluster: LiveCluster) -> Recorded:
        run = LiveRun(cluster)
        first = await cluster.status()
        result = await run.run(scenario, phase_loads(scenario, scenario.seeds[0]))
        snapshots = tuple(run.snapshots)
        if recorded:
            return Recorded(result, snapshots, first)
        return Recorded(result, snapshots, first, await copy_cost(cluster, scenario), await spread(cluster, scenario))

    for policy in scenario.policies:
        console.print(f"live {policy} #{scenario.seeds[0]} ...", markup=False)
        config = live_config(scenario, model, policy)
        recorded[policy] = with_cluster(scenario, config, model, console, play)
    return recorded


def compare(scenario: Scenario, model: Path, recorded: dict[str, Recorded]) -> Round:
    """Simulates every policy on what the first one's run told, and puts figure beside figure."""
    top_k, seed = read_config(model).top_k, scenario.seeds[0]
    first = scenario.policies[0]
    known = learn(scenario, live_config(scenario, model, first), recorded[first], top_k)
    since_s = sum(phase.duration_s for phase in scenario.phases[: scenario.live.calibrate])
    lines: list[dict[str, Any]] = [{"type": "constants", "seed": seed, **_constants(known)}]
    results: dict[str, SimulationResult] = {}
    figures: dict[str, tuple[Figures, Figures]] = {}
    for policy, run in recorded.items():
        predicted = predict(scenario, live_config(scenario, model, policy), known, run.first, top_k)
        live, simulated = (_figures(one, since_s, scenario.duration_s) for one in (run.result, predicted))
        lines.append(
            {
                "type": "policy",
                "policy": policy,
                "seed": seed,
                "live": live,
                "simulated": simulated,
                "error": _errors(live, simulated),
                "windows": {"live": _rates(run.result), "simulated": _rates(predicted)},
            }
        )
        results |= {f"{policy} live #{seed}": run.result, f"{policy} simulated #{seed}": predicted}
        figures[policy] = live, simulated
    return Round(seed, tuple(lines), figures, results)


def rank(all_rounds: Sequence[Round]) -> tuple[dict[str, Any], str]:
    """Medians over at least one round, and both orders by them: a JSON line, and the orders in words."""
    policies: dict[str, dict[str, Any]] = {}
    rates: dict[str, tuple[float, float]] = {}
    for policy in all_rounds[0].figures:
        live, simulated = (_medians([one.figures[policy][world] for one in all_rounds]) for world in (0, 1))
        rate = live["tokens_per_s"], simulated["tokens_per_s"]
        seen = [one.figures[policy][0]["tokens_per_s"] for one in all_rounds]
        policies[policy] = {
            "live": live,
            "simulated": simulated,
            "error": _errors(live, simulated),
            "live_tokens_per_s_range": [min(seen), max(seen)],
        }
        rates[policy] = rate
    orders = [_by_rate({policy: both[world] for policy, both in rates.items()}) for world in (0, 1)]
    against = [f"{one} and {other}" for one, other in combinations(rates, 2) if _disagree(rates[one], rates[other])]
    line = {
        "type": "ranking",
        "seeds": [one.seed for one in all_rounds],
        "policies": policies,
        "live": orders[0],
        "simulated": orders[1],
        "disagree": against,
    }
    text = "\n".join(f"{name}: {' > '.join(order)}" for name, order in zip(("live", "simulated"), orders, strict=True))
    return line, f"{text}\nclearly in another order: {', '.join(against) or 'none'}"


def _constants(known: Known) -> dict[str, float]:
    return {
        "call_us": known.cost.a_s * 1e6,
        "token_us": known.cost.b_s * 1e6,
        "step_us": known.step_cost.a_s * 1e6,
        "step_token_us": known.step_cost.b_s * 1e6,
        "message_us": known.message_s * 1e6,
        "answer_us": known.answer_s * 1e6,
        "copy_s": known.copy.seconds,
        "copy_slows": known.copy.slows,
    }


def _figures(result: SimulationResult, since_s: float, until_s: float) -> Figures:
    """Of the phases that are compared: tokens a second, and seconds of copies of experts (a process each, live)."""
    line = result.timeline
    edges = [0.0, *line.at_s]
    tokens = seconds = copy_seconds = 0.0
    for (began_s, at_s), num, copies in zip(pairwise(edges), line.tokens, line.copies, strict=True):
        if since_s <= began_s and at_s <= until_s + (at_s - began_s) / 2:
            tokens += num
            seconds += at_s - began_s
            copy_seconds += copies * (at_s - began_s)
    return {"tokens_per_s": tokens / max(seconds, 1e-9), "copy_seconds_per_s": copy_seconds / max(seconds, 1e-9)}


def _errors(live: Figures, simulated: Figures) -> dict[str, float | None]:
    return {name: simulated[name] / live[name] - 1 if live[name] else None for name in live}


def _medians(all_figures: Sequence[Figures]) -> Figures:
    return {name: median(one[name] for one in all_figures) for name in all_figures[0]}


def _rates(result: SimulationResult) -> list[list[float]]:
    """End of each window, tokens a second in it, copies and all bytes moved by its end."""
    line = result.timeline
    began = [0.0, *line.at_s]
    rows = zip(began, line.at_s, line.tokens, line.copies, line.moved_bytes, strict=False)
    return [
        [round(at_s, 2), round(num / max(at_s - began_s, 1e-9), 2), copies, moved]
        for began_s, at_s, num, copies, moved in rows
    ]


def _by_rate(rates: dict[str, float]) -> list[str]:
    return sorted(rates, key=lambda policy: -rates[policy])


def _disagree(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """True where both worlds have a clear order of the two, and not the same."""
    live, simulated = (a / max(b, 1e-9) - 1 for a, b in zip(one, other, strict=True))
    return min(abs(live), abs(simulated)) > CLEAR and (live > 0) != (simulated > 0)
