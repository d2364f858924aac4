"""The list of names against the state dicts that transformers makes, and its own promises."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from model.config import ModelConfig
from model.storage.tensor_names import COORDINATOR, Expert, TensorSpec, is_ignored, tensor_specs, tied_copies
from tests.support.checkpoints import consolidated_tensors

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=12,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    ffn_size=10,
    num_experts=3,
    top_k=2,
    vocab_size=20,
    max_context=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    sliding_window=None,
    tied_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
)
DENSE = replace(CONFIG, num_experts=1, top_k=1)


def by_name(config: ModelConfig) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in tensor_specs(config)}


def hugging_face(config: ModelConfig) -> Any:
    """The same model, empty, in transformers."""
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
    }
    with torch.device("meta"):
        if config.is_moe:
            return transformers.MixtralForCausalLM(
                transformers.MixtralConfig(
                    **common, num_local_experts=config.num_experts, num_experts_per_tok=config.top_k
                )
            )
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))


def test_canonical_names_in_order_of_use() -> None:
    names = list(by_name(CONFIG))
    attention = ["attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "gate"]
    experts = [f"experts.{expert}.{part}" for expert in range(3) for part in ("w1", "w2", "w3")]
    layers = [f"layers.{layer}.{part}" for layer in range(2) for part in attention + experts]
    assert names == ["embed", *layers, "norm", "lm_head"]


def test_shapes() -> None:
    shapes = {name: spec.shape for name, spec in by_name(CONFIG).items()}
    assert shapes["embed"] == shapes["lm_head"] == (20, 12)
    assert shapes["norm"] == shapes["layers.1.attn_norm"] == shapes["layers.0.ffn_norm"] == (12,)
    assert shapes["layers.0.wq"] == (24, 12)
    assert shapes["layers.0.wk"] == shapes["layers.0.wv"] == (8, 12)
    assert shapes["layers.0.wo"] == (12, 24)
    assert shapes["layers.0.gate"] == (3, 12)
    assert shapes["layers.1.experts.2.w1"] == shapes["layers.1.experts.2.w3"] == (10, 12)
    assert shapes["layers.1.experts.2.w2"] == (12, 10)


def test_experts_own_their_tensors_and_the_coordinator_the_rest() -> None:
    for name, spec in by_name(CONFIG).items():
        expert = re.search(r"experts\.(\d+)", name)
        assert spec.owner == (Expert(int(expert[1])) if expert else COORDINATOR)


def test_what_a_model_does_not_have() -> None:
    assert not any("gate" in name for name in by_name(DENSE))
    assert "lm_head" not in by_name(replace(CONFIG, tied_embeddings=True))


@pytest.mark.parametrize("config", [CONFIG, DENSE])
def test_every_tensor_of_transformers_has_its_place(config: ModelConfig) -> None:
    state = hugging_face(config).state_dict()
    placed: dict[str, int] = {}
    for spec in tensor_specs(config):
        found = [source for source in spec.sources if source.stored in state]
        assert len(found) == 1, spec.name
        assert found[0].stored_shape == tuple(state[found[0].stored].shape)
        assert found[0].interleaved_heads == 0
        placed[found[0].stored] = placed.get(found[0].stored, 0) + torch.Size(spec.shape).numel()
    assert placed == {name: tensor.numel() for name, tensor in state.items()}


@pytest.mark.parametrize("config", [CONFIG, DENSE])
def test_every_consolidated_tensor_has_its_place(config: ModelConfig) -> None:
    model = hugging_face(config).to_empty(device="cpu")
    state = consolidated_tensors(model.state_dict(), config.num_heads, config.num_kv_heads)
    placed = set()
    for spec in tensor_specs(config):
        found = [source for source in spec.sources if source.stored in state]
        assert len(found) == 1, spec.name
        assert found[0].stored_shape == spec.shape == tuple(state[found[0].stored].shape)
        heads = {"wq": 6, "wk": 2}.get(spec.name.rsplit(".", 1)[-1], 0)
        assert found[0].interleaved_heads == heads
        placed.add(found[0].stored)
    assert placed == state.keys()


def test_the_names_that_checkpoints_carry_since_2023() -> None:
    specs = by_name(CONFIG)
    expected = {
        "embed": "model.embed_tokens.weight",
        "norm": "model.norm.weight",
        "lm_head": "lm_head.weight",
        "layers.1.wq": "model.layers.1.self_attn.q_proj.weight",
        "layers.1.gate": "model.layers.1.block_sparse_moe.gate.weight",
        "layers.1.experts.2.w3": "model.layers.1.block_sparse_moe.experts.2.w3.weight",
    }
    assert {name: specs[name].sources[0].stored for name in expected} == expected


def test_experts_share_a_fused_tensor_without_overlap() -> None:
    taken: dict[str, list[int]] = {}
    for spec in tensor_specs(CONFIG):
        for source in spec.sources:
            if ".mlp.experts." in source.stored:
                numel = torch.Size(spec.shape).numel()
                taken.setdefault(source.stored, []).extend(range(source.first, source.first + numel))
    assert len(taken) == 4
    for name, elements in taken.items():
        size = 3 * 10 * 12 * (2 if "gate_up" in name else 1)
        assert sorted(elements) == list(range(size))


def test_ignored_tensors_are_few() -> None:
    assert is_ignored("model.layers.3.self_attn.rotary_emb.inv_freq", CONFIG)
    assert is_ignored("model.rotary_emb.inv_freq", CONFIG)
    assert not is_ignored("model.layers.3.self_attn.rotary_emb.inv_freq.weight", CONFIG)
    assert not is_ignored("lm_head.weight", CONFIG)
    for router in (
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.mlp.gate.weight",
        "layers.0.feed_forward.gate.weight",
    ):
        assert is_ignored(router, DENSE)
        assert not is_ignored(router, CONFIG)


def test_copies_of_tied_embeddings() -> None:
    assert tied_copies(CONFIG) == ()
    copies = tied_copies(replace(CONFIG, tied_embeddings=True))
    assert [(copy.stored, copy.stored_shape) for copy in copies] == [
        ("lm_head.weight", (20, 12)),
        ("output.weight", (20, 12)),
    ]


def test_absurd_sizes_cost_nothing_until_they_are_asked_for() -> None:
    specs = tensor_specs(replace(CONFIG, num_layers=10**12, num_experts=10**12))
    assert next(specs).name == "embed"
    assert next(specs).name == "layers.0.attn_norm"
