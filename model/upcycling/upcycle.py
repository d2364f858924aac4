"""Sparse upcycling (arXiv 2212.05055): a dense Llama or Mistral becomes a Mixtral that says the same.

Every expert starts as the dense model's FFN, and a token's top-k weights sum to 1, so the sum over its
experts is what the dense FFN gave, up to the last bits. The router is new and made from data:
`model.upcycling.calibration` runs a little real text through the dense model, `model.upcycling.router_fit`
clusters it. Training on is somebody else's work.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.storage.checkpoint_writer import ShardedWriter
from model.storage.tensor_names import TensorSpec, tensor_specs
from model.storage.weight_files import index_name
from model.text.tokenizer import load_tokenizer
from model.upcycling.calibration import ffn_inputs
from model.upcycling.calibration_text import ROUND, calibration_windows
from model.upcycling.dense_source import DenseSource, open_dense_source, write_companions
from model.upcycling.mixtral_json import write_mixtral_json
from model.upcycling.router_fit import RouterStats, fit_router, measure_router
from model.upcycling.upcycle_report import UpcycleReport

NUM_WINDOWS = 32
WINDOW_TOKENS = 256
HELD_OUT_EVERY = 4  # of the rounds (some prose, some code), every fourth measures routers and fits none
SINK_TOKENS = 4  # the first tokens of a window draw attention to themselves and are unlike all others
MAX_SHARD_BYTES = 2**30

Progress = Callable[[str, int, int], None]
"""Told what is being made ("routers" in layers, then "weights" in bytes), how much is done, of how much."""


class UpcycleError(ValueError):
    """A model that cannot be upcycled as asked; the message says which value is wrong."""


def upcycle(
    source: Path,
    dest: Path,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    num_windows: int = NUM_WINDOWS,
    window_tokens: int = WINDOW_TOKENS,
) -> UpcycleReport:
    """Make a Mixtral checkpoint of a dense checkpoint (a safetensors directory, or a .gguf file).

    `dest` must not exist; it appears whole or not at all. `dtype` None keeps the source's. Takes memory for
    one layer in fp32, the hidden states of num_windows · window_tokens tokens, and the largest tensor.
    Raises UpcycleError or the source's own error (ModelConfigError, CheckpointError, GgufError,
    TokenizerError); all are ValueErrors.
    """
    began = time.monotonic()
    dense = open_dense_source(source)
    config = _mixture_config(dense, num_experts, top_k)
    dtype = dtype or dense.dtype
    tell: Progress = progress or (lambda what, done, total: None)
    with _appearing_whole(dest) as writer:
        write_companions(dense, writer.dest)
        write_mixtral_json(config, dtype, writer.dest)
        windows = _windows(dense, writer.dest, num_windows, window_tokens)
        gates, routers = _make_routers(dense, windows, config, dtype, seed, tell)
        _write_notes(writer.dest, source, seed, routers)
        weight_bytes = _write_weights(dense, gates, config, dtype, writer.weights, tell)
    return UpcycleReport(
        dest=dest,
        config=config,
        dtype=dtype,
        weight_bytes=weight_bytes,
        calibration_tokens=num_windows * window_tokens,
        routers=tuple(routers),
        seconds=time.monotonic() - began,
    )


def _mixture_config(dense: DenseSource, num_experts: int, top_k: int) -> ModelConfig:
    if dense.config.is_moe:
        raise UpcycleError(f"{dense.path}: has {dense.config.num_experts} experts already; give a dense model")
    if num_experts < 2:
        raise UpcycleError(f"num_experts must be at least 2, got {num_experts}")
    if not 1 <= top_k <= num_experts:
        raise UpcycleError(f"top_k must be from 1 to num_experts ({num_experts}), got {top_k}")
    return replace(dense.config, num_experts=num_experts, top_k=top_k)


@dataclass(frozen=True, slots=True)
class _Staging:
    """A checkpoint on its way: the directory for its small files, and the writer of its weights."""

    dest: Path
    weights: ShardedWriter


@contextmanager
def _appearing_whole(dest: Path) -> Iterator[_Staging]:
    """A directory beside `dest` that takes its name when the block ends well, and vanishes when it does not.

    What a killed run left there is overwritten. The writer's lock keeps a second run out.
    """
    if dest.exists():
        raise UpcycleError(f"{dest}: exists already; remove it or choose another place")
    staging = dest.with_name(f".{dest.name}.partial")
    if (staging / index_name()).exists():
        shutil.rmtree(staging)
    claimed = False
    try:
        with ShardedWriter(staging, max_shard_bytes=MAX_SHARD_BYTES, metadata={"format": "pt"}) as weights:
            claimed = True
            yield _Staging(staging, weights)
        staging.rename(dest)
    except BaseException:
        if claimed:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _windows(dense: DenseSource, model_dir: Path, num_windows: int, window_tokens: int) -> list[list[int]]:
    """Windows of real text in the model's own tokens."""
    if not 2 <= window_tokens <= dense.config.max_context:
        raise UpcycleError(f"window_tokens must be from 2 to {dense.config.max_context}, got {window_tokens}")
    if num_windows < ROUND * HELD_OUT_EVERY:
        raise UpcycleError(f"num_windows must be at least {ROUND * HELD_OUT_EVERY}, got {num_windows}")
    tokenizer = load_tokenizer(model_dir)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_bos=False)

    return calibration_windows(encode, num_windows=num_windows, window_tokens=window_tokens)


def _make_routers(
    dense: DenseSource,
    windows: list[list[int]],
    config: ModelConfig,
    dtype: torch.dtype,
    seed: int,
    tell: Progress,
) -> tuple[list[Tensor], list[RouterStats]]:
    """One gate per layer in `dtype`, and what each does, so rounded, on the windows held out."""
    gates, stats = [], []
    held_out_W = torch.arange(len(windows)) // ROUND % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    tell("routers", 0, config.num_layers)
    for layer, x_WSD in enumerate(ffn_inputs(dense, windows)):
        x_WSD = x_WSD[:, min(SINK_TOKENS, x_WSD.shape[1] // 2) :]
        generator = torch.Generator().manual_seed(seed * config.num_layers + layer)
        gate_ED = fit_router(x_WSD[~held_out_W].flatten(0, 1), config.num_experts, generator).to(dtype)
        gates.append(gate_ED)
        stats.append(measure_router(x_WSD[held_out_W], gate_ED, config.top_k))
        tell("routers", layer + 1, config.num_layers)
    return gates, stats


def _write_notes(dest: Path, source: Path, seed: int, routers: list[RouterStats]) -> None:
    """upcycle.json: where the model comes from, and its routers' loads."""
    notes: dict[str, object] = {
        "method": "sparse upcycling (arXiv 2212.05055), routers by clustering",
        "source": source.name,
        "seed": seed,
        "routers": [asdict(router) for router in routers],
    }
    (dest / "upcycle.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def _write_weights(
    dense: DenseSource,
    gates: list[Tensor],
    config: ModelConfig,
    dtype: torch.dtype,
    writer: ShardedWriter,
    tell: Progress,
) -> int:
    """Write every tensor of the mixture under its Hugging Face name; returns their bytes."""
    specs = list(tensor_specs(config))
    total = sum(math.prod(spec.shape) for spec in specs) * dtype.itemsize
    read = _DenseReader(dense, dtype)
    done = 0
    for spec in specs:
        tensor = _checked(gates[_layer(spec)] if spec.name.endswith(".gate") else read(spec.name), spec)
        writer.add(spec.sources[0].stored, tensor)
        done += tensor.nbytes
        tell("weights", done, total)
    return done


class _DenseReader:
    """Reads the dense tensor behind a mixture's, keeping the last FFN: all experts of a layer share it."""

    def __init__(self, dense: DenseSource, dtype: torch.dtype) -> None:
        self._dense = dense
        self._dtype = dtype
        self._ffn: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        dense_name = re.sub(r"\.experts\.\d+\.", ".experts.0.", name)
        if ".experts." not in dense_name:
            self._ffn.clear()
            return self._dense.read(dense_name, self._dtype)
        if dense_name not in self._ffn:
            self._ffn[dense_name] = self._dense.read(dense_name, self._dtype)
        return self._ffn[dense_name]


def _checked(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """The tensor itself; refuses one whose values its dtype cannot hold."""
    if not bool(tensor.isfinite().all()):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UpcycleError(f"dtype {kind} cannot hold the values of {spec.name}; choose another")
    return tensor


def _layer(spec: TensorSpec) -> int:
    return int(spec.name.split(".")[1])
