"""Tiny random checkpoints, written by transformers, for tests of everything that reads or runs a model.

Every writer returns the model it wrote, in fp32 and eval mode, holding exactly the values on disk (rounded
through the stored dtype), so it is also the oracle. Weights are large (standard deviation 0.2) so that two
different computations give clearly different logits. The tokenizer files beside them are the work of
`tests.support.tokenizers`.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

BOS_ID = 1
EOS_ID = 2


def write_mixtral(
    dest: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    ffn: int = 112,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    experts: int = 4,
    top_k: int = 2,
    vocab: int = 300,
    max_context: int = 512,
    sliding_window: int | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int | None = None,
    rope_parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    fused: bool = False,
) -> transformers.MixtralForCausalLM:
    """Write a random Mixtral in Hugging Face format; `fused` means `mlp.experts.gate_up_proj`."""
    config = transformers.MixtralConfig(
        **_shape(layers, hidden, ffn, heads, kv_heads, head_dim, vocab, max_context, tied, rope_parameters),
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        sliding_window=sliding_window,
    )
    model: transformers.MixtralForCausalLM = _random(transformers.MixtralForCausalLM, config, seed)
    _save(model, dest, dtype, max_shard_size, original_format=not fused)
    return model


def write_dense_llama(
    dest: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    ffn: int = 112,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 300,
    max_context: int = 512,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int | None = None,
    rope_parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> transformers.LlamaForCausalLM:
    """Write a random dense Llama in Hugging Face format."""
    config = transformers.LlamaConfig(
        **_shape(layers, hidden, ffn, heads, kv_heads, head_dim, vocab, max_context, tied, rope_parameters)
    )
    model: transformers.LlamaForCausalLM = _random(transformers.LlamaForCausalLM, config, seed)
    _save(model, dest, dtype, max_shard_size, original_format=True)
    return model


def write_dense_mistral(
    dest: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    ffn: int = 112,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 300,
    max_context: int = 512,
    sliding_window: int | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int | None = None,
    rope_parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> transformers.MistralForCausalLM:
    """Write a random dense Mistral in Hugging Face format."""
    config = transformers.MistralConfig(
        **_shape(layers, hidden, ffn, heads, kv_heads, head_dim, vocab, max_context, tied, rope_parameters),
        sliding_window=sliding_window,
    )
    model: transformers.MistralForCausalLM = _random(transformers.MistralForCausalLM, config, seed)
    _save(model, dest, dtype, max_shard_size, original_format=True)
    return model


def write_mistral_consolidated(
    dest: Path, model: transformers.PreTrainedModel, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write a Mixtral, Mistral or Llama model as params.json and consolidated.safetensors."""
    config = model.config
    if config.rope_parameters["rope_type"] != "default":
        raise ValueError("rotary scaling is not written in Mistral's format")
    dest.mkdir(parents=True, exist_ok=True)
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "max_seq_len": config.max_position_embeddings,
        "rope_theta": config.rope_parameters["rope_theta"],
    }
    if getattr(config, "sliding_window", None) is not None:
        params["sliding_window"] = config.sliding_window
    if config.model_type == "mixtral":
        params["moe"] = {
            "num_experts": config.num_local_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
        }
    if config.tie_word_embeddings:
        params["tied_embeddings"] = True
    (dest / "params.json").write_text(json.dumps(params))
    tensors = consolidated_tensors(model.state_dict(), config.num_attention_heads, config.num_key_value_heads)
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(stored, dest / "consolidated.safetensors")


def consolidated_tensors(state: Mapping[str, Tensor], heads: int, kv_heads: int) -> dict[str, Tensor]:
    """A Hugging Face state dict under Mistral's names, query and key rows in interleaved rotary order."""
    plain = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate": "feed_forward.gate",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
    }
    top = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight"}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            if tensor.data_ptr() != state["model.embed_tokens.weight"].data_ptr():
                out["output.weight"] = tensor
            continue
        if name in top:
            out[top[name]] = tensor
            continue
        _, _, layer, part = name.split(".", 3)
        prefix, part = f"layers.{layer}.", part.removesuffix(".weight")
        if part == "self_attn.q_proj":
            out[f"{prefix}attention.wq.weight"] = _interleave(tensor, heads)
        elif part == "self_attn.k_proj":
            out[f"{prefix}attention.wk.weight"] = _interleave(tensor, kv_heads)
        elif part == "mlp.experts.gate_up_proj":
            for expert, both in enumerate(tensor):
                w1, w3 = both.chunk(2)
                out[f"{prefix}feed_forward.experts.{expert}.w1.weight"] = w1.clone()
                out[f"{prefix}feed_forward.experts.{expert}.w3.weight"] = w3.clone()
        elif part == "mlp.experts.down_proj":
            for expert, w2 in enumerate(tensor):
                out[f"{prefix}feed_forward.experts.{expert}.w2.weight"] = w2.clone()
        else:
            out[f"{prefix}{plain[part]}.weight"] = tensor
    return out


def _interleave(weight_OD: Tensor, heads: int) -> Tensor:
    """Rows of each head from (all first halves, all second halves) to (pairs side by side)."""
    rows, width = weight_OD.shape
    return weight_OD.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def _shape(
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    head_dim: int | None,
    vocab: int,
    max_context: int,
    tied: bool,
    rope_parameters: Mapping[str, Any] | None,
) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": max_context,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    if head_dim is not None:
        shape["head_dim"] = head_dim
    if rope_parameters is not None:
        shape["rope_parameters"] = dict(rope_parameters)
    return shape


def _random(model_class: type[Any], config: transformers.PreTrainedConfig, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.normal_(1.0, 0.2)
    return model.eval()


def _save(
    model: Any, dest: Path, dtype: torch.dtype, max_shard_size: str | int | None, *, original_format: bool
) -> None:
    stored = copy.deepcopy(model).to(dtype)  # casting the model itself would round its RoPE tables too
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.to(dtype))
    limit = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    stored.save_pretrained(dest, save_original_format=original_format, **limit)
