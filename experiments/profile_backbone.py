"""What the coordinator's own part of a step costs, phase by phase, with experts that answer at once.

`python -m experiments.profile_backbone MODEL [--case d32@160]... [--threads 1]` prints one JSON line per case:
medians in milliseconds. `dB@C` decodes B sequences at contexts of C to C + 127 tokens, `pBxL` prefills B prompts
of L tokens. What experts, transport and sampling take beside is other benchmarks' work.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from model.batch import ForwardBatch
from model.kernels import default_kernel
from model.kv_cache import KVCache
from model.storage.checkpoint import Checkpoint
from model.transformer import Backbone

CASES = ("d1@200", "d16@128", "d32@128", "p4x128")
_BLOCK = 32
_TOKENS = 40  # of the vocabulary


def make_case(name: str) -> Callable[[], ForwardBatch]:
    """The batch of a case, built anew at every call: building is part of a step."""
    found = re.fullmatch(r"(d)(\d+)@(\d+)|(p)(\d+)x(\d+)", name)
    if found is None:
        raise ValueError(f"a case looks like d16@128 or p4x128, got {name!r}")
    kind, count, length = (part for part in found.groups() if part is not None)
    sequences = int(count)
    if kind == "p":
        ids = [[(7 * at + row) % _TOKENS for at in range(int(length))] for row in range(sequences)]
        starts = [0] * sequences
    else:
        ids = [[row % _TOKENS] for row in range(sequences)]
        starts = [int(length) - 1 + (37 * row) % 128 for row in range(sequences)]
    needed = [-(-(start + len(new)) // _BLOCK) for start, new in zip(starts, ids, strict=True)]
    order = iter(torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).tolist())
    tables = [[next(order) for _ in range(blocks)] for blocks in needed]
    return lambda: ForwardBatch.build(ids, starts, tables)


def profile_step(backbone: Backbone, kv: KVCache, make: Callable[[], ForwardBatch]) -> dict[str, float]:
    """Milliseconds of each phase of one step."""
    before = asdict(backbone.times)
    began_s = perf_counter()
    batch = make()
    built_s = perf_counter() - began_s
    steps = backbone.forward(batch, kv)
    call = next(steps)
    try:
        while True:
            call = steps.send(call.plan.x_ND * 0.1)
    except StopIteration:
        phases = {name.removesuffix("_s"): value - before[name] for name, value in asdict(backbone.times).items()}
    times = {"build": built_s, **phases}
    return {name: 1e3 * value for name, value in {**times, "total": sum(times.values())}.items()}


def profile_case(backbone: Backbone, name: str, repeats: int) -> dict[str, float]:
    """Medians over `repeats` steps, after two to warm up."""
    make = make_case(name)
    blocks = 1 + max(block for item in make().sequences for block in item.block_table)
    kv = KVCache(backbone.config, blocks, _BLOCK)
    for layer in range(kv.num_layers):
        kv.kv(layer).zero_()
    steps = [profile_step(backbone, kv, make) for _ in range(repeats + 2)][2:]
    return {phase: round(median(step[phase] for step in steps), 3) for phase in steps[0]}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--case", action="append", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--kernel")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = Checkpoint.open(options.model)
    began_s = perf_counter()
    backbone = Backbone.load(checkpoint, options.kernel or default_kernel(checkpoint.dtype, "cpu"), "cpu")
    print(json.dumps({"load_s": round(perf_counter() - began_s, 2), "numerics_domain": backbone.numerics_domain}))
    for name in options.case or CASES:
        print(json.dumps({"case": name, **profile_case(backbone, name, options.repeats)}), flush=True)


if __name__ == "__main__":
    main()
