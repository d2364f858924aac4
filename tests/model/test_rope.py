"""Rotary embeddings against transformers, for every kind of scaling; and their independence of the batch."""

import math
from typing import Any

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding, apply_rotary_pos_emb

from model.config import ModelConfig, RopeScaling
from model.numerics import same_bits
from model.rope import RotaryTable, apply_rope_, inverse_frequencies

CONTEXT = 4096


def config(scaling: RopeScaling | None, head_dim: int = 64, max_context: int = CONTEXT) -> ModelConfig:
    return ModelConfig(
        num_layers=1,
        hidden_size=4 * head_dim,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        ffn_size=8,
        num_experts=1,
        top_k=1,
        vocab_size=8,
        max_context=max_context,
        norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=scaling,
        sliding_window=None,
        tied_embeddings=False,
        bos_token_id=None,
        eos_token_ids=(),
    )


def theirs(parameters: dict[str, Any], head_dim: int = 64) -> MixtralRotaryEmbedding:
    return MixtralRotaryEmbedding(
        MixtralConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head_dim,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_theta": 10_000.0, **parameters},
        )
    )


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
CASES: list[tuple[RopeScaling | None, dict[str, Any]]] = [
    (None, {"rope_type": "default"}),
    (
        RopeScaling(kind="linear", factor=4.0, original_max_context=CONTEXT),
        {"rope_type": "linear", "factor": 4.0},
    ),
    (
        RopeScaling(kind="dynamic", factor=2.0, original_max_context=CONTEXT),
        {"rope_type": "dynamic", "factor": 2.0},
    ),
    (
        RopeScaling(kind="llama3", factor=8.0, original_max_context=512, low_freq_factor=1.0, high_freq_factor=4.0),
        {"rope_type": "llama3", **LLAMA3},
    ),
    (
        RopeScaling(kind="yarn", factor=4.0, original_max_context=1024),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    ),
    (
        RopeScaling(kind="yarn", factor=8.0, original_max_context=512, beta_fast=16.0, attention_factor=1.25),
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 16.0,
            "attention_factor": 1.25,
        },
    ),
]


@pytest.mark.parametrize("head_dim", [64, 18])
@pytest.mark.parametrize(("scaling", "parameters"), CASES)
def test_frequencies_and_tables_equal_transformers(
    scaling: RopeScaling | None, parameters: dict[str, Any], head_dim: int
) -> None:
    reference = theirs(parameters, head_dim)
    inv_freq_h, factor = inverse_frequencies(config(scaling, head_dim))
    torch.testing.assert_close(inv_freq_h, reference.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(reference.attention_scaling)
    positions = torch.tensor([0, 1, 17, 1023, 1024, CONTEXT - 1])
    cos, sin = RotaryTable(config(scaling, head_dim), "cpu").rows(positions)
    their_cos, their_sin = reference(torch.empty(1), positions[None])
    half = head_dim // 2
    torch.testing.assert_close(cos[:, 0], their_cos[0], rtol=0, atol=5e-4)
    torch.testing.assert_close(sin[:, 0, half:], their_sin[0, :, half:], rtol=0, atol=5e-4)
    torch.testing.assert_close(sin[:, 0, :half], -their_sin[0, :, :half], rtol=0, atol=5e-4)


def test_rotation_equals_transformers() -> None:
    positions = torch.arange(300)
    x_THd = torch.randn(300, 3, 64, generator=torch.Generator().manual_seed(0))
    cos, sin = theirs({"rope_type": "default"})(x_THd, positions[None])
    expected, _ = apply_rotary_pos_emb(x_THd.transpose(0, 1)[None], x_THd.transpose(0, 1)[None], cos, sin)
    table = RotaryTable(config(None), "cpu")
    rotated = apply_rope_(x_THd.clone(), *table.rows(positions))
    torch.testing.assert_close(rotated, expected[0].transpose(0, 1), rtol=0, atol=1e-5)


def test_rotation_works_in_place_on_a_view() -> None:
    whole = torch.randn(5, 6, 64)
    expected = whole.clone()
    table = RotaryTable(config(None), "cpu")
    rows = table.rows(torch.arange(5))
    expected[:, :4] = apply_rope_(whole[:, :4].clone(), *rows)
    apply_rope_(whole[:, :4], *rows)
    assert same_bits(whole, expected)


def test_a_positions_numbers_do_not_depend_on_what_was_asked_before() -> None:
    positions = torch.tensor([3, 1500, 4000])
    at_once = RotaryTable(config(None), "cpu").rows(positions)
    table = RotaryTable(config(None), "cpu")
    grown = [table.rows(position[None]) for position in positions]
    for index in range(2):
        assert same_bits(torch.cat([pair[index] for pair in grown]), at_once[index])


def test_rotation_keeps_relative_positions() -> None:
    table = RotaryTable(config(None), "cpu")
    q, k = torch.randn(1, 1, 64).double(), torch.randn(1, 1, 64).double()

    def score(query_at: int, key_at: int) -> float:
        rotated = [
            apply_rope_(x.clone(), *(part.double() for part in table.rows(torch.tensor([at]))))
            for x, at in ((q, query_at), (k, key_at))
        ]
        return float((rotated[0] * rotated[1]).sum())

    assert score(40, 30) == pytest.approx(score(1040, 1030), rel=1e-3)


def test_dynamic_scaling_is_fixed_by_the_longest_context() -> None:
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_max_context=1024)
    plain, _ = inverse_frequencies(config(None))
    stretched, factor = inverse_frequencies(config(scaling, max_context=4096))
    base = 10_000.0 * (2.0 * 4096 / 1024 - 1.0) ** (64 / 62)
    torch.testing.assert_close(stretched, 1 / base ** (torch.arange(0, 64, 2) / 64), rtol=1e-5, atol=0)
    assert bool((stretched[1:] < plain[1:]).all())
    assert factor == 1.0
    assert inverse_frequencies(config(scaling, head_dim=2))[0].tolist() == [1.0]


def test_yarn_without_stretching_changes_nothing() -> None:
    scaling = RopeScaling(kind="yarn", factor=1.0, original_max_context=1024)
    inv_freq_h, factor = inverse_frequencies(config(scaling))
    torch.testing.assert_close(inv_freq_h, inverse_frequencies(config(None))[0])
    assert factor == 1.0
    stretched = RopeScaling(kind="yarn", factor=4.0, original_max_context=1024)
    assert inverse_frequencies(config(stretched))[1] == pytest.approx(0.1 * math.log(4.0) + 1.0)


def test_a_position_past_the_context_is_refused() -> None:
    table = RotaryTable(config(None), "cpu")
    table.rows(torch.tensor([CONTEXT - 1]))
    with pytest.raises(ValueError, match=f"position {CONTEXT} is past the model's context of {CONTEXT}"):
        table.rows(torch.tensor([5, CONTEXT]))
