"""What every tensor of a model is called: by this house, by Hugging Face, and by Mistral.

One list, `tensor_specs`, holds for each canonical name its shape, its owner and every place where a
checkpoint may keep it. Finding these places in files is `model.storage.ledger`'s work. Sources:
`modeling_mixtral.py` of transformers 4 (one tensor per expert, which transformers 5 still writes by default)
and 5 (fused), `mistral-inference`.

Shapes: D hidden size, F ffn size of one expert, E experts, V vocabulary, H·d query rows, G·d key and value
rows.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Coordinator:
    """The owner of everything but the experts."""


@dataclass(frozen=True, slots=True)
class Expert:
    """The owner of one expert's column: its FFN in every layer."""

    index: int


Owner = Coordinator | Expert
COORDINATOR = Coordinator()


@dataclass(frozen=True, slots=True)
class Source:
    """A place where a canonical tensor may be kept: inside tensor `stored`, from its element `first` on.

    `interleaved_heads` is 0 where the rows are in Hugging Face's rotary order (per head: all first halves,
    then all second halves); else the number of heads whose rows come as Mistral keeps them, the two of a pair
    side by side.
    """

    stored: str
    stored_shape: tuple[int, ...]
    first: int = 0
    interleaved_heads: int = 0


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that the model needs, and the places of which exactly one must exist."""

    name: str
    shape: tuple[int, ...]
    owner: Owner
    sources: tuple[Source, ...]


_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_LONE_ROUTER = re.compile(r"(model\.layers\.\d+\.(block_sparse_moe|mlp)|layers\.\d+\.feed_forward)\.gate\.weight")


def is_ignored(stored: str, config: ModelConfig) -> bool:
    """True for the few stored tensors that a model does not need.

    They are rotary frequencies, which old versions of transformers saved though they follow from the
    configuration, and the router of a model with one expert, whose softmax over one logit is always 1.
    """
    if config.num_experts == 1 and _LONE_ROUTER.fullmatch(stored):
        return True
    return _IGNORED.fullmatch(stored) is not None


def tied_copies(config: ModelConfig) -> tuple[Source, ...]:
    """Where a checkpoint with tied embeddings may keep a needless copy of them as the language-model head."""
    return _whole(_vocabulary_shape(config), "lm_head.weight", "output.weight") if config.tied_embeddings else ()


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the model, in the order of use. Lazy: a configuration may claim absurd sizes."""
    D, vocabulary = config.hidden_size, _vocabulary_shape(config)
    yield _spec("embed", _whole(vocabulary, "model.embed_tokens.weight", "tok_embeddings.weight"))
    for layer in range(config.num_layers):
        yield from _attention(config, layer)
        if config.is_moe:
            yield _gate(config, layer)
        for expert in range(config.num_experts):
            yield from _expert(config, layer, expert)
    yield _spec("norm", _whole((D,), "model.norm.weight", "norm.weight"))
    if not config.tied_embeddings:
        yield _spec("lm_head", _whole(vocabulary, "lm_head.weight", "output.weight"))


def _attention(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    D, H, G = config.hidden_size, config.num_heads, config.num_kv_heads
    query_rows, kv_rows = H * config.head_dim, G * config.head_dim
    ours, theirs, mistral = f"layers.{layer}", f"model.layers.{layer}", f"layers.{layer}"

    def plain(part: str, shape: tuple[int, ...], hugging_face: str, consolidated: str) -> TensorSpec:
        names = (f"{theirs}.{hugging_face}.weight", f"{mistral}.{consolidated}.weight")
        return _spec(f"{ours}.{part}", _whole(shape, *names))

    def rotary(part: str, rows: int, heads: int, hugging_face: str) -> TensorSpec:
        sources = (
            Source(f"{theirs}.self_attn.{hugging_face}.weight", (rows, D)),
            Source(f"{mistral}.attention.{part}.weight", (rows, D), interleaved_heads=heads),
        )
        return _spec(f"{ours}.{part}", sources)

    yield plain("attn_norm", (D,), "input_layernorm", "attention_norm")
    yield rotary("wq", query_rows, H, "q_proj")
    yield rotary("wk", kv_rows, G, "k_proj")
    yield plain("wv", (kv_rows, D), "self_attn.v_proj", "attention.wv")
    yield plain("wo", (D, query_rows), "self_attn.o_proj", "attention.wo")
    yield plain("ffn_norm", (D,), "post_attention_layernorm", "ffn_norm")


def _gate(config: ModelConfig, layer: int) -> TensorSpec:
    names = (
        f"model.layers.{layer}.block_sparse_moe.gate.weight",
        f"model.layers.{layer}.mlp.gate.weight",
        f"layers.{layer}.feed_forward.gate.weight",
    )
    return _spec(f"layers.{layer}.gate", _whole((config.num_experts, config.hidden_size), *names))


def _expert(config: ModelConfig, layer: int, expert: int) -> Iterator[TensorSpec]:
    """w1 (gate) and w3 (up), both [F, D], and w2 (down) [D, F] of one expert in one layer."""
    D, F, E = config.hidden_size, config.ffn_size, config.num_experts
    theirs, mistral = f"model.layers.{layer}", f"layers.{layer}.feed_forward"
    both, down = (E, 2 * F, D), (E, D, F)  # transformers 5 keeps the rows of w1 before those of w3
    fused = {
        "w1": Source(f"{theirs}.mlp.experts.gate_up_proj", both, first=expert * 2 * F * D),
        "w2": Source(f"{theirs}.mlp.experts.down_proj", down, first=expert * D * F),
        "w3": Source(f"{theirs}.mlp.experts.gate_up_proj", both, first=(expert * 2 + 1) * F * D),
    }
    dense = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for part in ("w1", "w2", "w3"):
        shape = (D, F) if part == "w2" else (F, D)
        names = [f"{theirs}.block_sparse_moe.experts.{expert}.{part}", f"{mistral}.experts.{expert}.{part}"]
        if E == 1:
            names += [f"{theirs}.mlp.{dense[part]}", f"{mistral}.{part}"]
        sources = (*_whole(shape, *(f"{name}.weight" for name in names)), fused[part])
        yield TensorSpec(f"layers.{layer}.experts.{expert}.{part}", shape, Expert(expert), sources)


def _spec(name: str, sources: tuple[Source, ...]) -> TensorSpec:
    """A tensor of the coordinator, which is always kept whole."""
    return TensorSpec(name, sources[0].stored_shape, COORDINATOR, sources)


def _whole(shape: tuple[int, ...], *stored: str) -> tuple[Source, ...]:
    return tuple(Source(name, shape) for name in stored)


def _vocabulary_shape(config: ModelConfig) -> tuple[int, int]:
    return config.vocab_size, config.hidden_size
