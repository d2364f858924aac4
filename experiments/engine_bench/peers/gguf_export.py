"""Writes a checkpoint as the fp16 GGUF file that llama.cpp reads, tensor by tensor, once into a cache.

Names and layouts follow llama.cpp's converter for the architecture `llama` with experts: the experts of a layer are
stacked, and each head's rows of q and k lie as pairs side by side. There is no vocabulary: prompts are token ids.
Router and norms stay in fp32, as the converter keeps them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from experiments.engine_bench.failures import BenchError
from model.config import ModelConfig
from model.storage.checkpoint import Checkpoint

Array = npt.NDArray[Any]
VERSION = 1  # of this writer: another layout, another file name
MOSTLY_F16 = 1

_EXPERT_PARTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor to come: `read` makes it when it is its turn, so that memory holds one."""

    name: str
    shape: tuple[int, ...]
    dtype: type[np.floating[Any]]
    read: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def cached_gguf(checkpoint: Checkpoint, cache_dir: Path, say: Callable[[str], None]) -> Path:
    """The file for `checkpoint`, written by the first call; it appears whole or not at all. Raises BenchError."""
    path = cache_dir / f"{checkpoint.path.name}-{checkpoint.weights_id[:12]}-f16-v{VERSION}.gguf"
    if not path.is_file():
        cache_dir.mkdir(parents=True, exist_ok=True)
        size = sum(item.nbytes for item in items(checkpoint))
        say(f"writing {size / 1e9:.1f} GB of fp16 GGUF for llama.cpp, once, to {path}")
        partial = path.with_suffix(".partial")
        try:
            write_gguf(checkpoint, partial)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """Writes the whole file. Raises BenchError for what the architecture cannot say or fp16 cannot hold."""
    _refuse_unsayable(checkpoint.config)
    with closing(gguf.GGUFWriter(path, "llama")) as writer:
        _add_keys(writer, checkpoint.config, checkpoint.path.name)
        todo = list(items(checkpoint))
        for item in todo:
            writer.add_tensor_info(item.name, item.shape, np.dtype(item.dtype), item.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for item in todo:
            array = item.read()
            if not np.isfinite(array).all():
                raise BenchError(f"{checkpoint.path}: fp16 cannot hold {item.name}, so llama.cpp cannot be a peer")
            writer.write_tensor_data(array)


def items(checkpoint: Checkpoint) -> Iterator[Item]:
    """Every tensor of the file, in its order."""
    config = checkpoint.config

    def plain(name: str, ours: str, dtype: type[np.floating[Any]] = np.float16, heads: int = 0) -> Item:
        def read() -> Array:
            array = _array(checkpoint, ours, dtype)
            return pairs_side_by_side(array, heads) if heads else array

        return Item(name, checkpoint.shape(ours), dtype, read)

    yield plain("token_embd.weight", "embed")
    yield plain("output_norm.weight", "norm", np.float32)
    if not config.tied_embeddings:
        yield plain("output.weight", "lm_head")
    for layer in range(config.num_layers):
        theirs, ours = f"blk.{layer}", f"layers.{layer}"
        yield plain(f"{theirs}.attn_norm.weight", f"{ours}.attn_norm", np.float32)
        yield plain(f"{theirs}.attn_q.weight", f"{ours}.wq", heads=config.num_heads)
        yield plain(f"{theirs}.attn_k.weight", f"{ours}.wk", heads=config.num_kv_heads)
        yield plain(f"{theirs}.attn_v.weight", f"{ours}.wv")
        yield plain(f"{theirs}.attn_output.weight", f"{ours}.wo")
        yield plain(f"{theirs}.ffn_norm.weight", f"{ours}.ffn_norm", np.float32)
        yield plain(f"{theirs}.ffn_gate_inp.weight", f"{ours}.gate", np.float32)
        for part, stacked in _EXPERT_PARTS.items():
            yield _stack(checkpoint, f"{theirs}.{stacked}.weight", layer, part)


def pairs_side_by_side(weight: Array, heads: int) -> Array:
    """Each head's rows from (all firsts, all seconds) to (first, second), (first, second), ..."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2)
    return np.ascontiguousarray(pairs.reshape(rows, width))


def _stack(checkpoint: Checkpoint, name: str, layer: int, part: str) -> Item:
    names = [f"layers.{layer}.experts.{expert}.{part}" for expert in range(checkpoint.config.num_experts)]

    def read() -> Array:
        return np.stack([_array(checkpoint, one, np.float16) for one in names])

    return Item(name, (len(names), *checkpoint.shape(names[0])), np.float16, read)


def _array(checkpoint: Checkpoint, name: str, dtype: type[np.floating[Any]]) -> Array:
    array: Array = checkpoint.read(name, torch.float16 if dtype is np.float16 else torch.float32).numpy()
    return array


def _add_keys(writer: gguf.GGUFWriter, config: ModelConfig, name: str) -> None:
    writer.add_name(name)
    writer.add_file_type(MOSTLY_F16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.top_k)
    writer.add_tokenizer_model("no_vocab")


def _refuse_unsayable(config: ModelConfig) -> None:
    if not config.is_moe:
        raise BenchError("only a model with experts is written for llama.cpp")
    if config.rope_scaling is not None:
        raise BenchError(f"rotary scaling {config.rope_scaling.kind!r} is not written for llama.cpp")
    if config.sliding_window is not None:
        raise BenchError("llama.cpp's llama architecture has no sliding window")
