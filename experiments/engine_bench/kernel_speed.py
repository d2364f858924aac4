"""How fast the kernel alone does the experts' work of a decode step: no cluster, no waiting, all cores.

The same calls of `ExpertColumn`, with as many rows per expert, one after another in one process. A step's rows are
drawn from the load that the cluster counted, for experts' calls cost by their rows and not by their average. Runs as a
child process (`peers.child`), so that its threads and memory are its own.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.supervision.blueprint import process_env
from experiments.engine_bench.peers.child import Handler, Request, serve
from experiments.engine_bench.peers.process import JsonProcess
from model.experts import Calibrations, ExpertColumn
from model.memory import collapse_into_huge_pages
from model.storage.checkpoint import Checkpoint, Expert

ENOUGH_BYTES = 2 << 30  # of weights: beyond any cache, so more layers would be no slower
MIN_STEPS = 4
MIN_SECONDS = 2.0


class KernelSpeed:
    """Columns of the first layers, as many as no cache can hold; later layers use their weights again."""

    def __init__(self, model_dir: str, kernel: str, threads: int) -> None:
        torch.set_num_threads(threads)
        checkpoint = Checkpoint.open(Path(model_dir))
        shape = checkpoint.config
        layer_bytes = sum(checkpoint.owned_bytes(Expert(e)) for e in range(shape.num_experts)) // shape.num_layers
        self._held = min(shape.num_layers, -(-ENOUGH_BYTES // layer_bytes))
        calibrated: Calibrations = {}
        self._columns = [
            ExpertColumn.load(checkpoint, expert, range(self._held), kernel, "cpu", calibrated=calibrated)
            for expert in range(shape.num_experts)
        ]
        collapse_into_huge_pages()  # as an expert does
        self._hidden = shape.hidden_size
        self.facts = {"kernel": self._columns[0].kernel, "threads": threads, "layers_held": self._held}

    def handle(self, request: Request) -> dict[str, Any]:
        """{"load", "batch", "top_k", "seed"} -> {"step_s", "cpu_s"}: medians of a few steps.

        `cpu_s` is of all threads: where others want the cores, eight processes get more of them than one, and only
        CPU times compare.
        """
        load, generator = request["load"], np.random.default_rng(request["seed"])
        generator_t = torch.Generator().manual_seed(request["seed"])
        x_BD = torch.randn(request["batch"], self._hidden, generator=generator_t)
        spent: list[float] = []
        cpu: list[float] = []
        while len(spent) < MIN_STEPS or sum(spent) < MIN_SECONDS:
            rows = [draw_rows(layer, request["batch"], request["top_k"], generator) for layer in load]
            began_s, cpu_began_s = time.perf_counter(), time.process_time()
            for layer, counts in enumerate(rows):
                for column, count in zip(self._columns, counts, strict=True):
                    if count:
                        column.forward(layer % self._held, x_BD[:count])
            spent.append(time.perf_counter() - began_s)
            cpu.append(time.process_time() - cpu_began_s)
        return {"step_s": float(np.median(spent)), "cpu_s": float(np.median(cpu)), "steps": len(spent)}


def draw_rows(load: Sequence[int], batch: int, top_k: int, generator: np.random.Generator) -> list[int]:
    """Rows per expert of one layer in one step: each token goes to `top_k` different experts, likely by `load`."""
    weights = np.asarray(load, dtype=np.float64) + 1e-9
    # The k largest of log weight + Gumbel noise are k draws without replacement (arXiv 1903.06059).
    keys = np.log(weights) + generator.gumbel(size=(batch, len(weights)))
    chosen = np.argsort(-keys, axis=1)[:, :top_k]
    return [int(count) for count in np.bincount(chosen.ravel(), minlength=len(weights))]


def start_kernel_speed(model_dir: Path, kernel: str, threads: int) -> JsonProcess:
    """The child, loaded. Raises BenchError."""
    request = {"model": str(model_dir), "kernel": kernel, "threads": threads}
    command = [sys.executable, "-m", __spec__.name]
    return JsonProcess("the kernel's own speed", command, request, process_env(threads))


def start(request: Request) -> tuple[dict[str, Any], Handler]:
    """{"model", "kernel", "threads"} -> the facts, and the handler."""
    kernel = KernelSpeed(request["model"], request["kernel"], request["threads"])
    return {"facts": kernel.facts}, kernel.handle


if __name__ == "__main__":
    serve(start)
