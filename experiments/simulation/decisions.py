"""How long the default balancing policy takes for a decision, in time of the processor, by model, hosts and ranges.

From a placed layout, windows of random popularity that stays, and then is another at once, which is when there is most
to decide. Each decision is made several times, and the quickest counts: on a busy machine others' work is in it. How
good the decisions are is `drifting`'s. `python -m experiments.simulation.decisions` prints some shapes.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from cluster.ids import NodeId
from cluster.incremental import Incremental
from cluster.layout import FloatArray, Grain, Host, Layout
from cluster.policy import Observation, apply

REPEATS = 3
BUSY_SHARE = 0.5
"""Of all hosts' time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Hosts with slots for `columns` experts each, cut into `ranges`."""

    layers: int = 32
    experts: int = 8
    hosts: int = 64
    columns: int = 2
    ranges: int = 1


@dataclass(frozen=True, slots=True)
class Took:
    """Milliseconds: to place the model, and for the decisions after that. Copies and drops in all of those."""

    placing_ms: float
    median_ms: float
    most_ms: float
    num_moves: int


def measure(shape: Shape, seed: int, *, windows: int = 12) -> Took:
    """Half of the windows before the popularity changes, half after it."""
    rng = np.random.default_rng(seed)
    grain = Grain.even(shape.layers, shape.experts, num_ranges=shape.ranges, layer_bytes=10**8)
    slots = shape.columns * shape.ranges
    on = tuple(Host(node_id=NodeId(f"host-{i}"), slots=slots, memory_bytes=1 << 60) for i in range(shape.hosts))
    # Bytes are no limit, so that each decision is as long as it may be.
    policy = Incremental(budget_bytes=1 << 50)
    work_LE = _work(shape, rng)
    empty = Observation(now_s=0.0, layout=Layout.empty(grain, on), work_LE=work_LE)
    began_s = time.process_time()
    actions, state = policy(empty, None)
    placing_s = time.process_time() - began_s
    layout, took_s, num_moves = apply(empty.layout, actions), list[float](), 0
    for window in range(windows):
        if window == windows // 2:
            work_LE = rng.permuted(work_LE, axis=1)
        seen, best_s = Observation(now_s=10.0 + 10.0 * window, layout=layout, work_LE=work_LE), float("inf")
        for _ in range(REPEATS):
            began_s = time.process_time()
            actions, after = policy(seen, state)
            best_s = min(best_s, time.process_time() - began_s)
        state, layout = after, apply(layout, actions)
        took_s.append(best_s)
        num_moves += len(actions)
    return Took(placing_s * 1e3, float(np.median(took_s)) * 1e3, max(took_s) * 1e3, num_moves)


def _work(shape: Shape, rng: np.random.Generator) -> FloatArray:
    """Zipf's law with exponent 0.8 over a random order of experts in each layer."""
    weights_E = (1.0 + np.arange(shape.experts)) ** -0.8
    work_LE: FloatArray = rng.permuted(np.tile(weights_E, (shape.layers, 1)), axis=1)
    work_LE *= BUSY_SHARE * shape.hosts / work_LE.sum()
    return work_LE


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "32 x 8 x 64": Shape(),
        "32 x 8 x 64, 8 ranges": Shape(ranges=8),
        "32 x 8 x 64, 32 ranges": Shape(ranges=32),
        "61 x 256 x 1024": Shape(layers=61, experts=256, hosts=1024),
    }
)


def main(names: list[str]) -> None:
    """Prints every shape, or those whose name contains one of `names`."""
    for name, shape in SHAPES.items():
        if not names or any(part in name for part in names):
            took = measure(shape, 0)
            print(
                f"{name:24} median {took.median_ms:6.1f} ms, most {took.most_ms:6.1f} ms, {took.num_moves} moves; "
                f"placing {took.placing_ms:.0f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
