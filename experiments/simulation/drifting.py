"""Balancing policies on a load whose popular experts change all the time: what balance costs in bytes moved.

Nothing is served and loads take no time, so that thousands of decisions take seconds: each window a policy sees the
work of the last one, what it decides holds from then on, and the next window's work says how even that left the hosts.
All policies see the same work. `python -m experiments.simulation.drifting` prints some shapes; latencies and time that
passes are `cluster.simulate`'s. L layers, E experts, N hosts.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from cluster.ids import NodeId
from cluster.layout import FloatArray, Grain, Host, Layout, critical_share
from cluster.load import balancedness
from cluster.policies import policy_named
from cluster.policy import Observation, Policy, apply, moved_bytes
from experiments.simulation.synthetic_routing import RoutingModel

WINDOW_S = 10.0
BUSY_SHARE = 0.5
"""Of all hosts' time, on average over a window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Hosts that hold `columns` experts each, cut into `ranges`; `tokens` are routed in a window of WINDOW_S."""

    routing: RoutingModel
    hosts: int
    columns: float
    ranges: int = 1
    layer_bytes: int = 352_000_000
    duration_s: float = 1200.0
    tokens: int = 20_000


@dataclass(frozen=True, slots=True)
class Followed:
    """Means over the windows after the first: of layers, mean work of hosts ÷ their most; the worst layer's; the share
    of time that steps wait for the busiest hosts. Bytes loaded after the model was placed.
    """

    balancedness: float
    worst_balancedness: float
    critical_share: float
    moved_bytes: int


def follow(policy: Policy, drift: Drift, seed: int) -> Followed:
    """One policy on one drift. Raises ValueError where the model does not fit on the hosts."""
    routing = drift.routing
    grain = Grain.even(routing.num_layers, routing.num_experts, num_ranges=drift.ranges, layer_bytes=drift.layer_bytes)
    slots = math.floor(drift.columns * drift.ranges + 1e-9)
    on = tuple(Host(node_id=NodeId(f"host-{i}"), slots=slots, memory_bytes=1 << 60) for i in range(drift.hosts))
    layout, state, moved = Layout.empty(grain, on), None, 0
    seen: list[tuple[float, float, float]] = []
    for window, work_LE in enumerate(_work(drift, seed)):
        if window:
            balanced_L = balancedness(layout.busy_LN(work_LE))
            share = critical_share(layout.busy_LN(work_LE))
            seen.append((float(balanced_L.mean()), float(balanced_L.min()), share))
        actions, state = policy(Observation(now_s=window * WINDOW_S, layout=layout, work_LE=work_LE), state)
        moved += moved_bytes(actions) if window else 0
        layout = apply(layout, actions)
    even, worst, waiting = (float(figure) for figure in np.mean(seen, axis=0))
    return Followed(even, worst, waiting, moved)


def _work(drift: Drift, seed: int) -> list[FloatArray]:
    """Each window's work, in seconds of one host per second: counted tokens, so it has their noise."""
    rng = np.random.default_rng(seed)
    num, every_s = int(drift.duration_s / WINDOW_S), drift.routing.drift_s
    frames = [drift.routing.popularity(rng) for _ in range(int(drift.duration_s / every_s) + 2)]
    total = BUSY_SHARE * drift.hosts / drift.routing.num_layers
    found: list[FloatArray] = []
    for window in range(num):
        which, part = divmod(window * WINDOW_S / every_s, 1.0)
        popularity_LE = (1 - part) * frames[int(which)] + part * frames[int(which) + 1]
        counts_LE = np.stack([rng.multinomial(drift.tokens, each_E) for each_E in popularity_LE])
        found.append(total / drift.tokens * counts_LE.astype(np.float64))
    return found


def _mixtral(law: str, skew: float, drift_s: float) -> RoutingModel:
    return RoutingModel(law=law, skew=skew, drift_s=drift_s)


SHAPES: Mapping[str, Drift] = MappingProxyType(
    {
        "8 hosts, 3 columns": Drift(routing=_mixtral("zipf", 1.2, 300), hosts=8, columns=3),
        "8 hosts, 2 columns in 8 ranges": Drift(routing=_mixtral("zipf", 0.8, 300), hosts=8, columns=2, ranges=8),
        "16 hosts, 2 in 8, Dirichlet": Drift(routing=_mixtral("dirichlet", 0.5, 300), hosts=16, columns=2, ranges=8),
        "32 hosts, 2 in 8": Drift(routing=_mixtral("zipf", 1.2, 300), hosts=32, columns=2, ranges=8),
        "64 hosts, 1 in 8, Dirichlet": Drift(routing=_mixtral("dirichlet", 1.0, 600), hosts=64, columns=1, ranges=8),
        "64 hosts, 2 in 32": Drift(routing=_mixtral("zipf", 0.8, 300), hosts=64, columns=2, ranges=32),
        "61 x 256, 64 hosts, 8 columns": Drift(
            routing=RoutingModel(num_layers=61, num_experts=256, top_k=8, drift_s=300), hosts=64, columns=8
        ),
    }
)


def main(names: list[str]) -> None:
    """Prints every shape, or those whose name contains one of `names`."""
    for name, drift in SHAPES.items():
        for seed in (0, 1) if not names or any(part in name for part in names) else ():
            for label in ("eplb", "incremental"):
                got = follow(policy_named(label, budget_bytes=24 * 10**9), drift, seed)
                moved = f"{got.moved_bytes / 1e9:9.1f} GB"
                even = f"{got.balancedness:.3f}, worst {got.worst_balancedness:.3f}"
                wait = f"{got.critical_share:.3f}"
                print(f"{name:32} seed {seed} {label:12} balancedness {even} waiting {wait} moved {moved}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
