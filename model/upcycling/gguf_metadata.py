"""The key-value pairs of a GGUF file, typed, and the `ModelConfig` they describe.

Keys and their meaning: the GGUF specification (ggml, docs/gguf.md). The tensors are `model.upcycling.gguf_source`'s
work, the vocabulary `model.upcycling.gguf_tokenizer`'s.
"""

import math
from collections.abc import Mapping
from typing import Literal, cast

from model.config import ModelConfig, RopeScaling


class GgufError(ValueError):
    """A GGUF file that is damaged, or holds something other than a dense Llama or Mistral."""


class GgufMetadata:
    """The metadata of one file; every accessor checks the type and names the key when it is wrong."""

    def __init__(self, fields: Mapping[str, object], path: str) -> None:
        self.fields = fields
        self.path = path

    def error(self, key: str, problem: str) -> GgufError:
        """A GgufError that names the file and the key."""
        return GgufError(f"{self.path}: {key} {problem}")

    def __contains__(self, key: str) -> bool:
        return key in self.fields

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; without a default the key must be there."""
        value = self._scalar(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"must be a whole number, got {value!r:.80}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, whole or not."""
        value = self._scalar(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, got {value!r:.80}")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._scalar(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, got {value!r:.80}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self.fields.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be a boolean, got {value!r:.80}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings, which must be there."""
        return cast("list[str]", self._list(key, str))

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers, which must be there."""
        return cast("list[int]", self._list(key, int))

    def numbers(self, key: str) -> list[float]:
        """A list of floating-point numbers, which must be there."""
        return cast("list[float]", self._list(key, float))

    def _scalar(self, key: str, default: object) -> object:
        value = self.fields.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        return value

    def _list(self, key: str, kind: type) -> list[object]:
        value = self.fields.get(key)
        if value is None:
            raise self.error(key, "is missing")
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self.error(key, f"must be a list of {kind.__name__}")
        return value


def read_model_config(
    metadata: GgufMetadata, *, vocab_size: int, tied_embeddings: bool, rope_factors: tuple[float, ...] | None
) -> ModelConfig:
    """The `ModelConfig` of a dense file of the "llama" architecture (which Mistral's files use too).

    `rope_factors` are the values of the tensor `rope_freqs.weight`, where there is one: llama.cpp stores
    Llama 3.1's RoPE scaling only so.
    """
    architecture = metadata.text("general.architecture")
    if architecture != "llama":
        raise metadata.error("general.architecture", f"is {architecture!r}; supported: 'llama'")
    if metadata.integer("llama.expert_count", 0):
        raise metadata.error("llama.expert_count", "is not 0: this model is a mixture of experts already")
    hidden, heads = metadata.integer("llama.embedding_length"), metadata.integer("llama.attention.head_count")
    head_dim = metadata.integer("llama.attention.key_length", hidden // max(heads, 1))
    rotary = metadata.integer("llama.rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise metadata.error("llama.rope.dimension_count", f"is {rotary}, not the head size {head_dim}")
    theta = metadata.number("llama.rope.freq_base", 10_000.0)
    max_context = metadata.integer("llama.context_length")
    scaling = _rope_scaling(metadata, max_context)
    if rope_factors is not None:
        scaling = llama3_scaling(rope_factors, head_dim, theta, metadata)
    return ModelConfig(
        num_layers=metadata.integer("llama.block_count"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=metadata.integer("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_size=metadata.integer("llama.feed_forward_length"),
        num_experts=1,
        top_k=1,
        vocab_size=vocab_size,
        max_context=max_context,
        norm_eps=metadata.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=metadata.integer("llama.attention.sliding_window", 0) or None,
        tied_embeddings=tied_embeddings,
        bos_token_id=_token_id(metadata, "bos"),
        eos_token_ids=eos_token_ids(metadata),
    )


def llama3_scaling(factors: tuple[float, ...], head_dim: int, theta: float, metadata: GgufMetadata) -> RopeScaling:
    """Find the Llama 3.x rule that gives these frequency divisors; refuse when none does."""
    for factor in (8.0, 32.0) if 2 * len(factors) == head_dim else ():  # a head's size is only a claim
        scaling = RopeScaling(kind="llama3", factor=factor, original_max_context=8192)
        expected = llama3_divisors(scaling, head_dim, theta)
        if all(abs(a - b) <= 1e-3 * b for a, b in zip(factors, expected, strict=True)):
            return scaling
    raise metadata.error("rope_freqs.weight", "is neither Llama 3.1's nor 3.2's RoPE scaling")


def llama3_divisors(scaling: RopeScaling, head_dim: int, theta: float) -> tuple[float, ...]:
    """What Llama 3.1's rule divides each of the head_dim / 2 RoPE frequencies by."""
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_context
    divisors = []
    for index in range(0, head_dim, 2):
        turns = context * theta ** (-index / head_dim) / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - keep) / scaling.factor + keep))
    return tuple(divisors)


def _rope_scaling(metadata: GgufMetadata, max_context: int) -> RopeScaling | None:
    kind = metadata.text("llama.rope.scaling.type", "none")
    if kind == "none":
        if metadata.number("llama.rope.scale_linear", 1.0) != 1.0:
            raise metadata.error("llama.rope.scale_linear", "is of an old format: convert the model again")
        return None
    if kind not in ("linear", "yarn"):
        raise metadata.error("llama.rope.scaling.type", f"is {kind!r}; supported: none, linear, yarn")
    return RopeScaling(
        kind=cast('Literal["linear", "yarn"]', kind),
        factor=metadata.number("llama.rope.scaling.factor"),
        original_max_context=metadata.integer("llama.rope.scaling.original_context_length", max_context),
        beta_fast=metadata.number("llama.rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=metadata.number("llama.rope.scaling.yarn_beta_slow", 1.0),
    )


def _token_id(metadata: GgufMetadata, which: str) -> int | None:
    key = f"tokenizer.ggml.{which}_token_id"
    return metadata.integer(key) if key in metadata else None


def eos_token_ids(metadata: GgufMetadata) -> tuple[int, ...]:
    """Every token that ends a reply: end of text, of turn, of message, as far as the file names them."""
    ids = (_token_id(metadata, which) for which in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(token for token in ids if token is not None))
