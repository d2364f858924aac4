"""Checkpoints with a real model's layer shapes and random weights, to measure what a demo model is too small for.

Made on the fly into a cache directory and kept there: some gigabytes, at the speed of the disk. There is no tokenizer
and the output means nothing; only shapes and speed are real.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from experiments.engine_bench.failures import BenchError
from model.config import ModelConfig
from model.storage.checkpoint_writer import ShardedWriter
from model.storage.tensor_names import TensorSpec, tensor_specs
from model.upcycling.mixtral_json import write_mixtral_json

DTYPE = torch.float16
DEVIATION = 0.02
MAX_SHARD_BYTES = 2**30
VERSION = 1

# Mixtral 8x7B (arXiv 2401.04088, table 1), but for its number of layers.
MIXTRAL = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=14336,
    num_experts=8,
    top_k=2,
    vocab_size=32000,
    max_context=32768,
    norm_eps=1e-5,
    rope_theta=1e6,
    rope_scaling=None,
    sliding_window=None,
    tied_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
)
SHAPES: Mapping[str, ModelConfig] = {"mixtral": MIXTRAL}


def weight_bytes(config: ModelConfig) -> int:
    """Of the checkpoint's file."""
    return sum(math.prod(spec.shape) for spec in tensor_specs(config)) * DTYPE.itemsize


def ensure_synthetic(config: ModelConfig, name: str, cache_dir: Path, say: Callable[[str], None]) -> Path:
    """The checkpoint's directory, made whole by the first call. Raises BenchError or OSError."""
    path = cache_dir / f"{name}-{config.num_layers}-layers-random-v{VERSION}"
    if path.is_dir():
        return path
    cache_dir.mkdir(parents=True, exist_ok=True)
    size, free = weight_bytes(config), shutil.disk_usage(cache_dir).free
    if free < 1.1 * size:
        raise BenchError(f"{path} needs {size / 1e9:.1f} GB, where {free / 1e9:.1f} GB are free")
    say(f"writing {size / 1e9:.1f} GB of random weights, once (a minute or three), to {path}")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_random(config, partial)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def write_random(config: ModelConfig, dest: Path, seed: int = 0) -> None:
    """Writes tensor by tensor; the same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    with ShardedWriter(dest, max_shard_bytes=MAX_SHARD_BYTES, metadata={"format": "pt"}) as writer:
        write_mixtral_json(config, DTYPE, dest)
        for spec in tensor_specs(config):
            writer.add(spec.sources[0].stored, _random(spec, generator))


def _random(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    if spec.name.endswith("norm"):
        return torch.ones(spec.shape, dtype=DTYPE)
    return torch.empty(spec.shape).normal_(0.0, DEVIATION, generator=generator).to(DTYPE)


def synthetic_model(shape: str, layers: int, cache_dir: Path, say: Callable[[str], None]) -> Path:
    """The checkpoint asked for on the command line. Raises BenchError for an unknown shape."""
    if shape not in SHAPES:
        raise BenchError(f"--synthetic is {shape!r}, but must be one of {', '.join(SHAPES)}")
    return ensure_synthetic(replace(SHAPES[shape], num_layers=layers), shape, cache_dir / "synthetic", say)
