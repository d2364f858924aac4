"""Read `ModelConfig` from the JSON beside a checkpoint: Hugging Face's config.json or Mistral's params.json.

Nothing that decides the mathematics has a default here: what the file does not say is an error naming the
file and the field, and so is what this house cannot compute (biases, quantized weights, other activations).
Rotary scaling is read by `model.storage.rope_reader`; the dataclasses and their own contradictions are
`model.config`'s.
"""

from collections.abc import Callable
from pathlib import Path

from model.config import ModelConfig, ModelConfigError
from model.storage.config_fields import FieldError, Fields
from model.storage.rope_reader import mistral_rope, refuse_partial_rotary, rope_from_hugging_face

_MODEL_TYPES = {"MixtralForCausalLM": "mixtral", "MistralForCausalLM": "mistral", "LlamaForCausalLM": "llama"}
_PARAMS_IGNORED = frozenset({"max_batch_size", "dtype"})
_PARAMS_CONTEXT = 128_000
"""Of a params.json that bounds no context, as most of Mistral's: mistral-inference computes so many positions."""


def read_config(model_dir: Path) -> ModelConfig:
    """The model's numbers from config.json, or from params.json where there is no config.json.

    Raises ModelConfigError naming the file and the field.
    """
    return config_from(config_path(model_dir), model_dir)


def config_path(model_dir: Path) -> Path:
    """The file that defines the model. Raises ModelConfigError where the directory has none."""
    if not model_dir.is_dir():
        raise ModelConfigError(f"{model_dir} is not a directory")
    for name in ("config.json", "params.json"):
        if (model_dir / name).is_file():
            return model_dir / name
    raise ModelConfigError(f"{model_dir} has neither config.json nor params.json")


def config_from(path: Path, model_dir: Path) -> ModelConfig:
    """Read the file that `config_path` chose, and the end ids of generation_config.json beside it."""
    fields = Fields.load(path)
    generation_path = model_dir / "generation_config.json"
    generation = Fields.load(generation_path) if generation_path.is_file() else None
    read: Callable[[Fields, Fields | None], ModelConfig]
    read = _from_hugging_face if path.name == "config.json" else _from_mistral
    try:
        return read(fields, generation)
    except FieldError:
        raise
    except ModelConfigError as error:
        raise ModelConfigError(f"{path}: {error}") from None


def _from_hugging_face(fields: Fields, generation: Fields | None) -> ModelConfig:
    architecture = _architecture(fields)
    _refuse_unsupported(fields)
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_experts, top_k = 1, 1
    if architecture == "MixtralForCausalLM":
        num_experts, top_k = fields.integer("num_local_experts"), fields.integer("num_experts_per_tok")
    vocab_size = fields.integer("vocab_size")
    max_context = fields.integer("max_position_embeddings")
    rope_theta, rope_scaling = rope_from_hugging_face(fields, max_context)
    return ModelConfig(
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(fields, num_heads),
        head_dim=_head_dim(fields, hidden_size, num_heads),
        ffn_size=fields.integer("intermediate_size"),
        num_experts=num_experts,
        top_k=top_k,
        vocab_size=vocab_size,
        max_context=max_context,
        norm_eps=fields.positive("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        sliding_window=_sliding_window(fields, architecture),
        tied_embeddings=fields.boolean("tie_word_embeddings", absent=False),
        bos_token_id=_bos(fields, vocab_size),
        eos_token_ids=_eos(fields, generation, vocab_size),
    )


def _from_mistral(fields: Fields, generation: Fields | None) -> ModelConfig:
    fields.require("model_type", ("transformer",))
    fields.require("activation", ("silu",))
    vocab_size = fields.integer("vocab_size")
    stated = [fields.integer(name) for name in ("max_position_embeddings", "max_seq_len") if fields.states(name)]
    rope_theta, rope_scaling = mistral_rope(fields)
    num_experts, top_k = 1, 1
    if fields.states("moe"):
        moe = fields.object("moe")
        num_experts, top_k = moe.integer("num_experts"), moe.integer("num_experts_per_tok")
        moe.refuse_unread()
    config = ModelConfig(
        num_layers=fields.integer("n_layers"),
        hidden_size=fields.integer("dim"),
        num_heads=fields.integer("n_heads"),
        num_kv_heads=fields.integer("n_kv_heads"),
        head_dim=fields.integer("head_dim"),
        ffn_size=fields.integer("hidden_dim"),
        num_experts=num_experts,
        top_k=top_k,
        vocab_size=vocab_size,
        max_context=min(stated, default=_PARAMS_CONTEXT),
        norm_eps=fields.positive("norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        sliding_window=fields.optional_integer("sliding_window"),
        tied_embeddings=fields.boolean("tied_embeddings", absent=False),
        bos_token_id=None,  # the format names no token ids: they are the tokenizer's
        eos_token_ids=() if generation is None else _token_ids(generation, "eos_token_id", vocab_size),
    )
    fields.refuse_unread(_PARAMS_IGNORED)
    return config


def _architecture(fields: Fields) -> str:
    names = fields.value("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.problem("architectures", f"must be a list of one name, got {names!r}")
    architecture: str = names[0]
    if architecture not in _MODEL_TYPES:
        raise fields.problem("architectures", f"{architecture!r} is unknown; known: {', '.join(_MODEL_TYPES)}")
    fields.require("model_type", (_MODEL_TYPES[architecture],))
    return architecture


def _refuse_unsupported(fields: Fields) -> None:
    """Refuse what would change the mathematics and is not computed here; absent or null changes nothing."""
    for name in ("quantization_config", "compression_config"):
        if fields.states(name):
            raise fields.problem(name, "is present; quantized checkpoints are not supported, only plain weights")
    for name in ("attention_bias", "mlp_bias"):
        if fields.boolean(name, absent=False):
            raise fields.problem(name, "is true; layers with biases are not supported")
    activation = fields.value("hidden_act")
    if activation not in ("silu", "swish"):
        raise fields.problem("hidden_act", f"{activation!r} is unknown; known: silu")
    if fields.boolean("rope_interleaved", absent=False):
        raise fields.problem("rope_interleaved", "is true; only the half-rotation order is supported")
    refuse_partial_rotary(fields)


def _head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    """`head_dim`, or as these architectures define its absence: hidden_size / num_attention_heads."""
    head_dim = fields.optional_integer("head_dim")
    if head_dim is not None:
        return head_dim
    if num_heads < 1 or hidden_size % num_heads:
        why = f"hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({num_heads})"
        raise fields.problem("head_dim", f"is missing, and {why}")
    return hidden_size // num_heads


def _num_kv_heads(fields: Fields, num_heads: int) -> int:
    """`num_key_value_heads`; an explicit null is how these architectures write "as many as query heads"."""
    if fields.value("num_key_value_heads") is None:
        return num_heads
    return fields.integer("num_key_value_heads")


def _sliding_window(fields: Fields, architecture: str) -> int | None:
    if architecture == "MistralForCausalLM" and not fields.has("sliding_window"):  # which this class reads as 4096
        raise fields.problem("sliding_window", "is missing; state its tokens, or null where the model has none")
    window = fields.optional_integer("sliding_window")
    if window is not None and architecture == "LlamaForCausalLM":
        raise fields.problem("sliding_window", f"is {window}, but LlamaForCausalLM has no sliding window")
    kind = "full_attention" if window is None else "sliding_attention"
    layers = fields.value("layer_types") if fields.states("layer_types") else []
    if not isinstance(layers, list) or any(layer != kind for layer in layers):
        raise fields.problem("layer_types", f"must be all {kind!r}, as sliding_window says")
    return window


def _bos(fields: Fields, vocab_size: int) -> int | None:
    ids = _token_ids(fields, "bos_token_id", vocab_size)
    if len(ids) > 1:
        raise fields.problem("bos_token_id", f"must be one id or null, got {len(ids)} ids")
    return ids[0] if ids else None


def _eos(fields: Fields, generation: Fields | None, vocab_size: int) -> tuple[int, ...]:
    """The ids of both files, each once, in order of appearance."""
    sources = [source for source in (fields, generation) if source is not None and source.has("eos_token_id")]
    if not sources:
        raise fields.problem("eos_token_id", "is missing (null states that there is none)")
    ids = [token for source in sources for token in _token_ids(source, "eos_token_id", vocab_size)]
    return tuple(dict.fromkeys(ids))


def _token_ids(fields: Fields, name: str, vocab_size: int) -> tuple[int, ...]:
    """One id, a list of ids, or none where the field is absent or null."""
    value = fields.value(name) if fields.has(name) else None
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise fields.problem(name, f"must hold integers from 0 to {vocab_size - 1}, got {token!r}")
    return tuple(ids)
