"""One run of `octavo bench engine`, from checked options to the last line: starts everybody, measures, ends everybody.

What can be refused is refused before anything starts: unknown peers, missing libraries, contradictory variants, and
more contestants than memory holds, since all of them stay up, idle, while each is measured in its turn.
"""

import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from actors import ray_runtime
from actors.supervision.blueprint import Blueprint
from cluster.budget import gigabytes
from cluster.config import ClusterConfig
from experiments.engine_bench import __doc__ as definitions
from experiments.engine_bench.cells import Cell, Variant
from experiments.engine_bench.cluster import ClusterContestant
from experiments.engine_bench.contestants import Contestant, Prompts
from experiments.engine_bench.failures import BenchError
from experiments.engine_bench.kernel_speed import ENOUGH_BYTES, start_kernel_speed
from experiments.engine_bench.peers.gguf_export import cached_gguf
from experiments.engine_bench.peers.registry import PeerContestant, PeerKind, find_peer
from experiments.engine_bench.prompts import Encode, make_prompts, word_ids
from experiments.engine_bench.report import JsonLines, show
from experiments.engine_bench.rounds import KernelStep, MakePrompts, Measurement, Rounds
from experiments.engine_bench.summary import summarise, whole_repeats
from model.kernels import default_kernel
from model.kv_cache import block_bytes, default_kv_dtype
from model.storage.checkpoint import COORDINATOR, Checkpoint
from model.text.tokenizer import TokenizerError, load_tokenizer

NAMESPACE = "octavo-bench"
QUEUE_WAIT_S = 3600.0  # all prompts of a cell are submitted at once: none may be refused for those before it
PEER_OVERHEAD = 1.25  # of its weights: what a library holds beside them


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that was chosen. `kernel_speed` measures the kernel alone too."""

    model: Path
    cells: tuple[Cell, ...]
    variants: Mapping[str, Variant]
    peers: tuple[str, ...]
    peer_python: str
    peer_env: Mapping[str, str]
    repeats: int
    seed: int
    max_num_batched_tokens: int
    cache_dir: Path
    kernel_speed: bool = False


def run(plan: Plan, out: JsonLines, console: Console) -> None:
    """Measures all of `plan`. Raises BenchError or what starting a cluster raises; whatever was started is ended."""
    kinds = [find_peer(name, plan.peer_python, plan.peer_env) for name in dict.fromkeys(plan.peers)]
    checkpoint = Checkpoint.open(plan.model)
    configs = cluster_configs(plan, checkpoint)
    check_memory(plan, checkpoint, configs, kinds)
    cores = len(os.sched_getaffinity(0))
    with stopping_in_order() as undo:
        contestants = _start_all(plan, checkpoint, configs, kinds, cores, undo, console)
        kernel_step = _start_kernel(plan, checkpoint, cores, undo, console) if plan.kernel_speed else None
        rounds = Rounds(
            contestants=contestants,
            cells=plan.cells,
            make_prompts=prompt_maker(checkpoint),
            repeats=plan.repeats,
            seed=plan.seed,
            kernel_step=kernel_step,
        )
        console.print("warming up ...")
        rounds.warm_up()
        out.write(_setup(plan, checkpoint, contestants, cores))
        _measure(rounds, list(configs), out, console)


def cluster_configs(plan: Plan, checkpoint: Checkpoint) -> dict[str, ClusterConfig]:
    """One configuration for each variant, with KV blocks for the largest cell. Raises ConfigError or BenchError."""
    longest = max(cell.tokens for cell in plan.cells)
    if longest > checkpoint.config.max_context:
        raise BenchError(f"{longest} tokens a sequence, but the model's context is {checkpoint.config.max_context}")
    most = max(cell.batch for cell in plan.cells)
    base = ClusterConfig(
        model=str(plan.model),
        max_num_seqs=max(64, most),
        max_waiting_requests=max(256, most),
        max_queue_wait_s=QUEUE_WAIT_S,
        max_num_batched_tokens=max(plan.max_num_batched_tokens, most),
        prefix_caching=False,  # cells and repeats may ask for the same prompts
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks = 1 + max(cell.kv_blocks(base.block_size) for cell in plan.cells)
    one_block = block_bytes(checkpoint.config, base.block_size, default_kv_dtype(device))
    configs = {}
    for index, (name, variant) in enumerate(plan.variants.items()):
        config = variant.config(base, f"{NAMESPACE}-{os.getpid()}-{index}")
        config.check_model(checkpoint.config.num_experts, checkpoint.config.max_context)
        configs[name] = replace(config, kv_cache_bytes=blocks * one_block)
    return configs


def check_memory(
    plan: Plan, checkpoint: Checkpoint, configs: Mapping[str, ClusterConfig], kinds: list[PeerKind]
) -> None:
    """Raises BenchError where the contestants, all alive at once, would not fit."""
    available = psutil.virtual_memory().available
    gpus = float(torch.cuda.device_count())
    needs = {
        name: sum(need.host_bytes for need in Blueprint(config, checkpoint, gpus).needs(available))
        for name, config in configs.items()
    }
    weights = sum(checkpoint.owned_bytes(owner) for owner in checkpoint.owners) // checkpoint.dtype.itemsize
    needs |= {kind.name: int(PEER_OVERHEAD * kind.bytes_per_weight * weights) for kind in kinds}
    if plan.kernel_speed:
        experts = sum(checkpoint.owned_bytes(one) for one in checkpoint.owners if one != COORDINATOR)
        needs["the kernel alone"] = min(2 * ENOUGH_BYTES, experts)
    total = sum(needs.values())
    if total > available:
        parts = ", ".join(f"{name} {gigabytes(need)}" for name, need in needs.items())
        raise BenchError(
            f"all contestants stay up at once and need {gigabytes(total)} ({parts}), but {gigabytes(available)} of "
            "memory are available: ask for fewer variants or peers"
        )


def prompt_maker(checkpoint: Checkpoint) -> MakePrompts:
    """Real text through the model's tokenizer; words as ids where it has none."""
    try:
        tokenizer = load_tokenizer(checkpoint.path)
    except TokenizerError:
        encode: Encode = word_ids(checkpoint.config.vocab_size)
    else:

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_bos=True)

    made: dict[tuple[int, int, int], Prompts] = {}

    def make(count: int, length: int, seed: int) -> Prompts:
        key = (count, length, seed)
        if key not in made:
            made[key] = make_prompts(encode, count=count, length=length, seed=seed)
        return made[key]

    return make


def _start_all(
    plan: Plan,
    checkpoint: Checkpoint,
    configs: Mapping[str, ClusterConfig],
    kinds: list[PeerKind],
    cores: int,
    undo: ExitStack,
    console: Console,
) -> list[Contestant]:
    contestants: list[Contestant] = []
    console.print("starting Ray ...")
    ray_runtime.start_local(NAMESPACE)
    undo.callback(ray_runtime.disconnect)
    stop_on_signals()  # after Ray, which installs a handler of its own
    for name, config in configs.items():
        console.print(f"starting {name} ...", markup=False)
        cluster = ClusterContestant(name, config, cores, console)
        undo.callback(cluster.close)
        contestants.append(cluster)
    for kind in kinds:
        model = plan.model
        if kind.reads_gguf:
            model = cached_gguf(checkpoint, plan.cache_dir / "gguf", _sayer(console))
        console.print(f"starting {kind.name} ...", markup=False)
        peer = PeerContestant(kind, str(model), cores, plan.peer_python, plan.peer_env)
        undo.callback(peer.close)
        contestants.append(peer)
    return contestants


def _start_kernel(plan: Plan, checkpoint: Checkpoint, cores: int, undo: ExitStack, console: Console) -> KernelStep:
    console.print("loading the kernel alone ...")
    kernel = next(iter(plan.variants.values())).kernel
    if kernel == "auto":
        kernel = default_kernel(checkpoint.dtype, torch.device("cpu"))
    process = start_kernel_speed(plan.model, kernel, cores)
    undo.callback(process.close)

    def step(cell: Cell, load: Any, seed: int) -> tuple[float, float]:
        request = {"load": load, "batch": cell.batch, "top_k": checkpoint.config.top_k, "seed": seed}
        answer = process.ask(request)
        return float(answer["step_s"]), float(answer["cpu_s"])

    return step


def _measure(rounds: Rounds, ours: list[str], out: JsonLines, console: Console) -> None:
    """Whoever stops a long run still gets what its whole repeats say."""
    done: list[Measurement] = []

    def tell(one: Measurement) -> None:
        done.append(one)
        out.write(one.to_json())
        console.print(
            f"  repeat {one.repeat + 1}, batch {one.cell.batch}, {one.contestant}: "
            f"prefill {one.prefill_tok_s:.0f}, decode {one.decode_tok_s:.1f} tok/s",
            markup=False,
        )

    try:
        rounds.run(tell)
    finally:
        whole = whole_repeats(done, len(rounds.cells) * len(rounds.contestants))
        summaries = [summarise(cell, whole, ours) for cell in rounds.cells if whole]
        for summary in summaries:
            out.write(summary.to_json())
        if summaries:
            show(summaries, console)


def _setup(plan: Plan, checkpoint: Checkpoint, contestants: list[Contestant], cores: int) -> dict[str, object]:
    """The first line: what a reader must know to judge the others."""
    return {
        "type": "setup",
        "model": plan.model.name,
        "weights_id": checkpoint.weights_id,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "definitions": definitions,
        "cores": cores,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "repeats": plan.repeats,
        "seed": plan.seed,
        "contestants": [{"name": one.name, "ours": one.is_ours, **one.facts} for one in contestants],
    }


def _sayer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, soft_wrap=True, markup=False)


def stop_on_signals() -> None:
    """Also where SIGINT is ignored from the start, as a shell has it for what runs in the background."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


@contextmanager
def stopping_in_order() -> Iterator[ExitStack]:
    """What is to be undone, which is done however the block ends, and which impatience does not interrupt."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with ExitStack() as undo:
        undo.callback(lambda: [signal.signal(number, handler) for number, handler in before.items()])
        try:
            yield undo
        finally:
            for number in before:
                signal.signal(number, signal.SIG_IGN)
