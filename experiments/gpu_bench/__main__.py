"""`python -m experiments.gpu_bench`: measures, a JSON line for each; a short table is the end of it."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from experiments.gpu_bench.decode_speed import CONTEXT, Model, StepSpeed, decode_batch, prefill_batch
from experiments.gpu_bench.expert_speed import ExpertSpeed, expert_speeds
from experiments.gpu_bench.random_weights import RandomWeights
from experiments.gpu_bench.timing import Ceilings, measure_ceilings

_RESERVE_BYTES = 16 << 30


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", action="append", help="default: bf16 and fp8")
    parser.add_argument("--batch", action="append", type=int, help="default: 1, 16 and 64")
    parser.add_argument("--layers", type=int, help="default: as many as fit, at most 32")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--only", choices=("expert", "step"))
    parser.add_argument("--json-out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("octavo: no CUDA device is here")
    ceilings = measure_ceilings()
    rows: list[str] = []
    with open(options.json_out or "/dev/null", "w") as out:
        for line in _lines(options, ceilings):
            text = json.dumps(line.to_json())
            print(text, flush=True)
            print(text, file=out, flush=True)
            rows.append(_row(line))
    print("\n".join(row for row in rows if row))


def _lines(options: argparse.Namespace, ceilings: Ceilings) -> Iterator[Ceilings | ExpertSpeed | StepSpeed]:
    yield ceilings
    kernels = options.kernel or ["bf16", "fp8"]
    if options.only != "step":
        for kernel in kernels:
            yield from expert_speeds(kernel, ceilings)
            torch.cuda.empty_cache()
    if options.only != "expert":
        for kernel in kernels:
            yield from _steps(options, kernel, ceilings)
            torch.cuda.empty_cache()


def _steps(options: argparse.Namespace, kernel: str, ceilings: Ceilings) -> Iterator[StepSpeed]:
    batches = options.batch or [1, 16, 64]
    model = Model(kernel, options.layers or fitting_layers(kernel), max(*batches, 1) * CONTEXT + options.prefill)
    for count in batches:
        yield model.measure(f"decode {count}", decode_batch(count), count, ceilings)
    yield model.measure(f"prefill {options.prefill}", prefill_batch(options.prefill), 1, ceilings)


def fitting_layers(kernel: str) -> int:
    """Of Mixtral 8x7B, beside what a step needs."""
    one = RandomWeights.of(layers=1)
    layer_bytes = 8 * one.expert_bytes * (1 if kernel == "fp8" else 2) / 2 + one.backbone_bytes
    return min(32, int((torch.cuda.mem_get_info()[0] - _RESERVE_BYTES) / layer_bytes))


def _row(line: Ceilings | ExpertSpeed | StepSpeed) -> str:
    if isinstance(line, Ceilings):
        return f"{line.device}: copy {line.copy_bytes_s / 1e12:.2f} TB/s, bf16 {line.bf16_flop_s / 1e12:.0f} TFLOP/s"
    if isinstance(line, ExpertSpeed):
        share = line.floor_us / line.graph_us
        return (
            f"{line.kernel} {line.rows:4} rows: {line.graph_us:6.0f} us, direct {line.direct_us:6.0f}, "
            f"floor {line.floor_us:6.0f} ({share:.0%})"
        )
    return (
        f"{line.kernel} {line.layers} layers, {line.kind}: {line.step_ms:.1f} ms, floor {line.floor_ms:.1f}, "
        f"{1e3 * line.tokens / line.step_ms:.0f} tok/s, GPU busy {line.busy:.0%}, {line.launches} launches, "
        f"{line.active_experts:.1f} experts"
    )


if __name__ == "__main__":
    main()
