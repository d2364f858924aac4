"""Hosts that follow the load against the cheapest fixed number that is as quick: a day of Azure's requests, simulated.

The day is a public trace's arrivals and lengths, thinned so that the rate goes from `night` to all of it and back. It
runs once with hosts that follow it, then with fixed numbers of hosts, balanced by the same policy, until the smallest
is found whose 99th percentiles (first token, and each token after it) are no worse. One JSON line tells each run, and
one compares. `python -m experiments.simulation.over_provision TRACE.csv`; simulating is `cluster.simulate`'s.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from cluster.autoscale import Autoscaled
from cluster.ids import NodeId
from cluster.layout import Grain, Host
from cluster.policies import policy_named
from cluster.policy import Policy
from cluster.routing_trace import RoutingTrace
from cluster.service_time import ServiceTime
from cluster.simulate import SimulationConfig, SimulationResult, simulate
from experiments.simulation.report import summary
from experiments.simulation.request_traces import read_requests
from experiments.simulation.synthetic_routing import RoutingModel, synthesize

NUM_ROUTED = 20_000
P99 = ("p99_ttft_s", "p99_tpot_s")
AS_GOOD = 1.02
"""A fixed number is as quick as the hosts that follow when no 99th percentile is above so many times theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """The load, and the machines; `night` is the rate then over the rate at noon.

    `scale` multiplies the rate, and the coordinators that share it: their steps take as many more tokens. With `slow`
    every step takes so many times longer and requests come as much more rarely, so that a day has fewer steps; hosts
    start as quickly as ever. `columns`: how many experts a host has memory for. `down_window_s`: for so long fewer
    hosts must have sufficed before one is given back; the scaler's own default would be an hour of a day this short.
    """

    rate: float = 0.8
    scale: int = 1
    slow: float = 1.0
    duration_s: float = 7200.0
    night: float = 0.2
    layers: int = 8
    experts: int = 8
    skew: float = 0.8
    drift_s: float = 1800.0
    columns: float = 2.0
    ranges: int = 1
    min_hosts: int = 4
    max_hosts: int = 256
    call_s: float = 6e-3
    token_s: float = 240e-6
    step_s: float = 15e-3
    step_token_s: float = 150e-6
    layer_bytes: int = 1_408_000_000
    host_start_s: float = 60.0
    down_window_s: float = 120.0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 1024


def load(path: Path, day: Day, seed: int) -> RoutingTrace:
    """The day's requests with routing from chance."""
    rng = np.random.default_rng(seed)
    requests = (
        read_requests(path)
        .at_rate(day.rate * day.scale / day.slow, day.duration_s)
        .over_a_day(rng, day.duration_s, night=day.night)
    )
    model = RoutingModel(num_layers=day.layers, num_experts=day.experts, skew=day.skew, drift_s=day.drift_s)
    return synthesize(model, requests, rng, num_tokens=NUM_ROUTED, duration_s=day.duration_s)


def run(trace: RoutingTrace, day: Day, num_hosts: int, policy: Policy) -> SimulationResult:
    """The day with so many hosts at first."""
    grain = Grain.even(day.layers, day.experts, num_ranges=day.ranges, layer_bytes=day.layer_bytes)
    slots = math.floor(day.columns * day.ranges + 1e-9)
    hosts = tuple(Host(node_id=NodeId(f"host-{i}"), slots=slots, memory_bytes=1 << 60) for i in range(num_hosts))
    config = SimulationConfig(
        cost=ServiceTime(day.slow * day.call_s, day.slow * day.token_s),
        step_cost=ServiceTime(day.slow * day.step_s, day.slow * day.step_token_s / day.scale),
        max_num_seqs=day.max_num_seqs * day.scale,
        max_num_batched_tokens=day.max_num_batched_tokens * day.scale,
        load_bytes_per_s=2e9,
        host_start_s=day.host_start_s,
    )
    return simulate(trace, policy, grain=grain, hosts=hosts, template=hosts[0], config=config)


def fixed(day: Day) -> Policy:
    """What balances, on the hosts that there are."""
    return policy_named("incremental", budget_bytes=8 * day.layers * day.layer_bytes)


def following(day: Day, **options: Any) -> Policy:
    """The same, with hosts that follow the load."""
    scaling: dict[str, Any] = {"lead_s": day.host_start_s, "down_window_s": day.down_window_s, **options}
    return Autoscaled(inner=fixed(day), min_hosts=day.min_hosts, max_hosts=day.max_hosts, **scaling)


def smallest(low: int, high: int, is_enough: Callable[[int], bool], first: int | None = None) -> int:
    """The smallest number from `low` to `high` that is enough, where more is never less; `high` where none is.

    Asks about `first` first, a guess.
    """
    middle = (low + high) // 2 if first is None else max(first, low)
    while low < high:
        middle = min(middle, high - 1)
        if is_enough(middle):
            high = middle
            middle = (low + high) // 2
        else:
            # What is enough is not far above the guess: `high` may be many times that, and takes long to simulate.
            low = middle + 1
            middle = min((low + high) // 2, low + low // 4)
    return high


def compare(path: Path, day: Day, seed: int, tell: Callable[[dict[str, Any]], None], **options: Any) -> dict[str, Any]:
    """Both, told as they end; what is returned compares them. `saved` is of host-seconds."""
    trace = load(path, day, seed)
    followed = run(trace, day, day.min_hosts * 2, following(day, **options))
    ours, peak = summary(followed), max(followed.timeline.hosts)
    tell({"type": "run", "hosts": "following", "peak_hosts": peak, **_told(ours)})
    runs: dict[int, dict[str, Any]] = {}

    def is_enough(num: int) -> bool:
        runs[num] = summary(run(trace, day, num, fixed(day)))
        tell({"type": "run", "hosts": num, **_told(runs[num])})
        return all(runs[num][name] <= AS_GOOD * ours[name] for name in P99)

    num = smallest(day.min_hosts, day.max_hosts, is_enough, peak)
    if num not in runs:
        is_enough(num)
    return {
        "type": "over-provision",
        "trace": path.name,
        "seed": seed,
        **asdict(day),
        "fixed_hosts": num,
        "mean_hosts": ours["mean_hosts"],
        "peak_hosts": peak,
        "least_hosts": min(followed.timeline.hosts),
        "saved": 1 - ours["host_seconds"] / runs[num]["host_seconds"],
        **{name: ours[name] for name in P99},
        **{f"fixed_{name}": runs[num][name] for name in P99},
    }


def _told(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: figures[name] for name in ("host_seconds", "mean_hosts", "completed", "num_steps", *P99)}


def main(
    trace: Annotated[Path, typer.Argument(help="Azure's .csv or Mooncake's .jsonl.")],
    rate: Annotated[float, typer.Option(help="Requests a second at noon.")] = 0.8,
    duration_s: Annotated[float, typer.Option(help="Length of the day.")] = 7200.0,
    scale: Annotated[list[int] | None, typer.Option(help="Times the rate, and the coordinators; repeatable.")] = None,
    columns: Annotated[list[float] | None, typer.Option(help="Experts that fit on a host; repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of what is left to chance; repeatable.")] = None,
    slow: Annotated[float, typer.Option(help="Times the length of steps, with as many fewer requests.")] = 1.0,
    down_window_s: Annotated[float, typer.Option(help="How long fewer hosts must have sufficed.")] = 120.0,
) -> None:
    """How many host-seconds hosts that follow the load save over the cheapest fixed number that is as quick."""

    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    for times, most, chance in product(scale or [1], columns or [2.0], seed or [0]):
        day = Day(rate=rate, duration_s=duration_s, scale=times, columns=most, slow=slow, down_window_s=down_window_s)
        tell(compare(trace, day, chance, tell))


if __name__ == "__main__":
    typer.run(main)
