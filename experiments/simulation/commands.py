"""What `octavo trace` and `octavo simulate` do, in one piece each: files in, files and text out.

Errors that a person can mend are `CommandError`s of one line.
"""

import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import typer

from actors.command.added_commands import CommandError
from cluster.autoscale import Autoscaled
from cluster.ids import NodeId
from cluster.layout import Grain, Host
from cluster.load import balancedness
from cluster.policies import NAMES, policy_named
from cluster.policy import Policy
from cluster.routing_trace import RoutingTrace, read_trace, write_trace
from cluster.scaling_config import parse_options
from cluster.service_time import ServiceTime, quantiles
from cluster.simulate import SimulationConfig, SimulationResult
from cluster.simulate import simulate as simulate_trace
from experiments.simulation.report import report_html, report_json, table
from experiments.simulation.request_traces import Requests, poisson, read_requests
from experiments.simulation.synthetic_routing import RoutingModel, synthesize

MAX_NODES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSettings:
    """Where a synthetic trace's requests come from; `night` None is the same rate all day."""

    path: Path | None
    rate: float
    duration_s: float
    prompt: int
    output: int
    night: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """What was typed, in the units in which it is typed. Checked where it is used."""

    policies: tuple[str, ...]
    nodes: int
    columns: float
    ranges: int
    autoscale: str | None
    target_share: float
    layer_mb: float
    call_us: float
    token_us: float
    step_us: float
    step_token_us: float
    max_num_seqs: int
    max_num_batched_tokens: int
    window_s: float
    budget_gb: float
    load_gb_s: float
    host_start_s: float
    eplb_interval_s: float

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= MAX_NODES:
            raise CommandError(f"--nodes is {self.nodes}, but it must be 1 to {MAX_NODES}")
        for name in ("columns", "layer_mb", "budget_gb"):
            if not 0 < getattr(self, name) < 1e9:
                raise CommandError(f"--{name.replace('_', '-')} is {getattr(self, name)}, but it must be above 0")
        for label in self.policies:
            if label.partition(" ")[0] not in NAMES:
                raise CommandError(f"--policy is {label!r}, but it must be one of {', '.join(NAMES)}")
            self.balancing(label)
        self.limits()

    def balancing(self, label: str) -> Policy:
        """The policy of a label `name` or `name option=value, option=value`, with the options of `policy_options`."""
        name, _, text = label.partition(" ")
        try:
            options = parse_options(text)
            if name == "eplb":
                options = {"interval_s": self.eplb_interval_s, **options}
            return policy_named(name, budget_bytes=int(self.budget_gb * 1e9), options=options)
        except ValueError as error:
            raise CommandError(f"--policy is {label!r}: {error}") from None

    def limits(self) -> tuple[int, int] | None:
        """MIN and MAX of --autoscale."""
        if self.autoscale is None:
            return None
        low, _, high = self.autoscale.partition(":")
        if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= self.nodes <= int(high) <= MAX_NODES):
            raise CommandError(
                f"--autoscale is {self.autoscale!r}, but it must be MIN:MAX, "
                f"with 1 <= MIN <= the {self.nodes} nodes of --nodes <= MAX <= {MAX_NODES}"
            )
        return int(low), int(high)


def parse_skew(text: str) -> tuple[str, float]:
    """`zipf:0.8` as ("zipf", 0.8)."""
    law, _, strength = text.partition(":")
    try:
        return law, float(strength)
    except ValueError:
        raise CommandError(f"--skew is {text!r}, but it must be like zipf:0.8 or dirichlet:0.5") from None


def load(path: Path) -> RoutingTrace:
    """The routing trace in a file."""
    with _told(str(path)), path.open("rb") as file:
        return read_trace(file)


def save(trace: RoutingTrace, path: Path) -> None:
    """Writes the trace; an earlier file is replaced at once, or stays."""
    with _told(str(path)), tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            write_trace(trace, file)  # type: ignore[arg-type]  # a temporary file is a BinaryIO in all but type
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def make_trace(model: RoutingModel, asked: RequestSettings, *, num_tokens: int, seed: int) -> RoutingTrace:
    """A synthetic trace."""
    rng = np.random.default_rng(seed)
    with _told("trace synth"):
        requests = _requests(asked, rng)
        return synthesize(model, requests, rng, num_tokens=num_tokens, duration_s=asked.duration_s)


def trace_stats(trace: RoutingTrace) -> dict[str, Any]:
    """Sizes, request rates and lengths, and of the routing: skew by layer, locality, and how far popularity drifts."""
    stats: dict[str, Any] = {
        "num_requests": len(trace.arrival_s),
        "num_tokens": len(trace.experts),
        "num_layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
    }
    if len(trace.arrival_s):
        stats["duration_s"] = float(trace.arrival_s[-1])
        stats["requests_per_s"] = len(trace.arrival_s) / max(float(trace.arrival_s[-1]), 1e-9)
        stats["mean_prompt_tokens"] = float(trace.prompt_tokens.mean())
        stats["mean_output_tokens"] = float(trace.output_tokens.mean())
    if len(trace.experts):
        counts_LE = trace.counts()
        share_L = counts_LE.max(axis=1) / np.maximum(counts_LE.sum(axis=1), 1)
        first_TL = trace.experts[:, :, 0]
        stats["balancedness"] = _named(balancedness(counts_LE))
        stats["hottest_expert_share"] = _named(share_L)
        same = _same_as_last(first_TL, trace.token_request)
        if same is not None:
            stats["same_first_expert_as_last_token"] = same
        stats["drift"] = _drift(trace)
    return stats


def compare(
    trace: RoutingTrace, name: str, settings: SimulationSettings, *, html: Path | None, json_file: Path | None
) -> dict[str, SimulationResult]:
    """Runs every policy, prints the table, writes the reports."""
    results: dict[str, SimulationResult] = {}
    with _told("simulate"):
        for label, policy in policies(settings, trace):
            print(f"simulating {label} ...", file=sys.stderr, flush=True)
            results[label] = run(trace, policy, settings)
    print(table(results))
    told = {"trace": name, **{key: value for key, value in asdict(settings).items() if value is not None}}
    told["policies"] = ", ".join(results)
    with _told("simulate"):
        if json_file is not None:
            json_file.write_text(report_json(told, results))
        if html is not None:
            html.write_text(report_html(f"Octavo simulation of {name}", told, results))
    return results


def policies(settings: SimulationSettings, trace: RoutingTrace) -> Iterator[tuple[str, Policy]]:
    """Each policy with its label; with --autoscale all but static follow the load with their hosts too."""
    limits = settings.limits()
    for name in dict.fromkeys(settings.policies):
        policy = settings.balancing(name)
        if limits is None or name == "static":
            yield name, policy
        else:
            low, high = limits
            yield (
                f"{name}+scale",
                Autoscaled(inner=policy, min_hosts=low, max_hosts=high, target_share=settings.target_share),
            )


def run(trace: RoutingTrace, policy: Policy, settings: SimulationSettings) -> SimulationResult:
    """One simulation."""
    layer_bytes = int(settings.layer_mb * 1e6)
    grain = Grain.even(trace.num_layers, trace.num_experts, num_ranges=settings.ranges, layer_bytes=layer_bytes)
    slots = math.floor(settings.columns * settings.ranges + 1e-9)
    memory = math.ceil(slots * float(grain.bytes_U.max()))
    hosts = tuple(Host(node_id=NodeId(f"host-{i}"), slots=slots, memory_bytes=memory) for i in range(settings.nodes))
    config = SimulationConfig(
        cost=ServiceTime(settings.call_us * 1e-6, settings.token_us * 1e-6),
        step_cost=ServiceTime(settings.step_us * 1e-6, settings.step_token_us * 1e-6),
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        window_s=settings.window_s,
        load_bytes_per_s=settings.load_gb_s * 1e9,
        host_start_s=settings.host_start_s,
    )
    return simulate_trace(trace, policy, grain=grain, hosts=hosts, template=hosts[0], config=config)


def run_app(app: typer.Typer, name: str) -> None:
    """Runs a command line of its own; a failure that has a name is one line on stderr and exit status 1."""
    try:
        app()
    except CommandError as error:
        if os.environ.get("OCTAVO_TRACEBACK"):
            raise
        print(f"octavo {name}: {error}", file=sys.stderr)
        sys.exit(1)


def _requests(asked: RequestSettings, rng: np.random.Generator) -> Requests:
    if asked.path is None:
        requests = poisson(rng, rate=asked.rate, duration_s=asked.duration_s, prompt=asked.prompt, output=asked.output)
    else:
        requests = read_requests(asked.path).at_rate(asked.rate, asked.duration_s)
    return requests if asked.night is None else requests.over_a_day(rng, asked.duration_s, night=asked.night)


def _same_as_last(first_TL: Any, token_request: Any) -> float | None:
    """Share of tokens that take the first expert of the token before them: in their request, where that is known."""
    order = np.argsort(token_request, kind="stable")
    owner = token_request[order]
    follows = (owner[1:] == owner[:-1]) & ((owner[1:] >= 0) | (token_request < 0).all())
    same_TL = first_TL[order][1:] == first_TL[order][:-1]
    return float(same_TL[follows].mean()) if follows.any() else None


def _drift(trace: RoutingTrace, num_parts: int = 10) -> dict[str, float]:
    """Total variation between the popularity of a tenth of the trace and that of the next, of the median layer."""
    edges = np.linspace(0, len(trace.experts), min(num_parts, len(trace.experts)) + 1).astype(int)
    parts = [trace.counts(int(a), int(b)) for a, b in pairwise(edges)]
    shares = [part / np.maximum(part.sum(axis=1, keepdims=True), 1) for part in parts]
    moved = [float(np.median(np.abs(b - a).sum(axis=1) / 2)) for a, b in pairwise(shares)]
    return {"mean": float(np.mean(moved)), "max": float(np.max(moved))} if moved else {"mean": 0.0, "max": 0.0}


def _named(values_L: Any) -> dict[str, float]:
    found = quantiles(np.asarray(values_L, np.float64))
    return {"min": found[0.0], "median": found[0.5], "max": found[1.0]}


@contextmanager
def _told(what: str) -> Iterator[None]:
    """What a person can mend, as one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise CommandError(f"{what}: {error}") from error
