"""The numbers that define a model, as one frozen value.

Reading them from a checkpoint's JSON is `model.storage.config_reader`'s work.
"""

from dataclasses import dataclass
from typing import Literal


class ModelConfigError(ValueError):
    """A model configuration that is missing a field, contradicts itself, or is of an unknown architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How RoPE frequencies are stretched past the trained context. Units: positions.

    `linear` divides positions by `factor`; `dynamic` is NTK-aware scaling of the base; `llama3` is Llama 3.1's
    piecewise rule; `yarn` is arXiv 2309.00071.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: float
    original_max_context: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of the Mixtral family; a dense Llama or Mistral is the case `num_experts == 1`.

    `hidden_size` is D, `ffn_size` F (of one expert), `num_experts` E, `top_k` K, `vocab_size` V. `sliding_window`
    counts the keys a query sees, itself included; None sees all. Source of the shapes: arXiv 2401.04088, table 1.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    num_experts: int
    top_k: int
    vocab_size: int
    max_context: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    sliding_window: int | None
    tied_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size")
        for name in (*sizes, "num_experts", "top_k", "vocab_size", "max_context"):
            value = getattr(self, name)
            if value < 1:
                raise ModelConfigError(f"{name} must be at least 1, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise ModelConfigError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.top_k > self.num_experts:
            raise ModelConfigError(f"top_k ({self.top_k}) must not exceed num_experts ({self.num_experts})")
        if self.head_dim % 2:
            raise ModelConfigError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ModelConfigError(f"sliding_window must be at least 1 or absent, got {self.sliding_window}")

    @property
    def is_moe(self) -> bool:
        """True where a router chooses among several experts."""
        return self.num_experts > 1
