"""Writes a `ModelConfig` as a Mixtral's config.json in Hugging Face format; `model.storage.config_reader` reads it."""

import json
from pathlib import Path

import torch

from model.config import ModelConfig, RopeScaling


def write_mixtral_json(config: ModelConfig, dtype: torch.dtype, dest: Path) -> None:
    """Write config.json into `dest`, in the spelling that transformers 4 and 5 both read."""
    (dest / "config.json").write_text(json.dumps(mixtral_json(config, dtype), indent=2) + "\n")


def mixtral_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, object]:
    """The fields of config.json; `dtype` is that of the stored weights."""
    eos = config.eos_token_ids
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope_json(config.rope_scaling),
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def rope_json(scaling: RopeScaling) -> dict[str, object]:
    """Hugging Face's `rope_scaling`: each kind with the fields that belong to it, and no others."""
    fields: dict[str, object] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        fields["original_max_position_embeddings"] = scaling.original_max_context
    if scaling.kind == "llama3":
        fields |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        fields |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            fields["attention_factor"] = scaling.attention_factor
    return fields
