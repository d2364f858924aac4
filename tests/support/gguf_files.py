"""Tiny GGUF files of random dense models, as llama.cpp's converter writes them.

Names, the order of wq's and wk's rows and the keys follow convert_hf_to_gguf.py of llama.cpp.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import transformers
from gguf import GGMLQuantizationType, quants

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
Array = npt.NDArray[Any]


def write_gguf(
    path: Path,
    model: transformers.LlamaForCausalLM,
    tokenizer_dir: Path | None = None,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array | None] | None = None,
) -> Path:
    """Write `model` with the vocabulary of `tokenizer_dir`.

    `keys` are added to the metadata or replace it (None drops one); `tensors` likewise, by GGUF name.
    """
    fields = model_keys(model.config) | (vocabulary_keys(tokenizer_dir) if tokenizer_dir else {})
    fields |= keys or {}
    stored = dense_tensors(model) | dict(tensors or {})
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", "llama"))
    for key, value in fields.items():
        if value is not None:
            _add(writer, key, value)
    for name, array in stored.items():
        if array is not None and array.ndim == 2:
            writer.add_tensor(name, quants.quantize(array, kind), raw_dtype=kind)
        elif array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_keys(config: Any) -> dict[str, Any]:
    """The keys that describe the shape of a transformers LlamaConfig."""
    return {
        "general.name": "tiny",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
    }


def vocabulary_keys(tokenizer_dir: Path, pre: str = "gpt-2") -> dict[str, Any]:
    """The keys of a byte-level BPE vocabulary, out of the tokenizer.json that `write_byte_tokenizer` wrote."""
    stored = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    special = {token["content"] for token in stored["added_tokens"]}
    tokens = sorted(stored["model"]["vocab"], key=stored["model"]["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in stored["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index(config["bos_token"]),
        "tokenizer.ggml.eos_token_id": tokens.index(config["eos_token"]),
        "tokenizer.ggml.unknown_token_id": tokens.index(config["unk_token"]),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": config["chat_template"],
    }


def dense_tensors(model: transformers.LlamaForCausalLM) -> dict[str, Array]:
    """Every tensor in fp32 under its GGUF name."""
    config: Any = model.config
    out: dict[str, Array] = {}
    for name, tensor in model.state_dict().items():
        base, array = name.removesuffix(".weight"), np.ascontiguousarray(tensor.float().numpy())
        if base in TOP_NAMES:
            if not (base == "lm_head" and config.tie_word_embeddings):
                out[f"{TOP_NAMES[base]}.weight"] = array
            continue
        _, _, layer, part = base.split(".", 3)
        if part == "self_attn.q_proj":
            array = interleave(array, config.num_attention_heads)
        elif part == "self_attn.k_proj":
            array = interleave(array, config.num_key_value_heads)
        out[f"blk.{layer}.{LAYER_NAMES[part]}.weight"] = array
    return out


def interleave(weight: Array, heads: int) -> Array:
    """Each head's rows from (first halves, second halves) to pairs side by side, as llama.cpp's converter does."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2)
    return np.ascontiguousarray(pairs.reshape(rows, width))


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        assert isinstance(value, Sequence)
        writer.add_array(key, value)
