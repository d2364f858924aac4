"""Rotary bases and scalings in every spelling, against what transformers makes of the same files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.config import ModelConfigError, RopeScaling
from model.storage.config_fields import Fields
from model.storage.rope_reader import mistral_rope, rope_from_hugging_face

Read = Callable[..., tuple[float, RopeScaling | None]]
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.fixture
def read() -> Read:
    return lambda **values: rope_from_hugging_face(Fields(Path("config.json"), values), max_context=1000)


@pytest.fixture
def read_params() -> Read:
    return lambda **values: mistral_rope(Fields(Path("params.json"), values))


def test_a_base_alone(read: Read) -> None:
    assert read(rope_theta=10000) == (10000.0, None)
    assert read(rope_theta=10000, rope_scaling=None) == (10000.0, None)
    assert read(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}) == (5e5, None)
    assert read(rope_theta=5e5, rope_parameters={"rope_theta": 5e5}) == (5e5, None)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (
            {"rope_type": "linear", "factor": 2},
            RopeScaling(kind="linear", factor=2.0, original_max_context=1000),
        ),
        (
            {"type": "dynamic", "factor": 2.5},
            RopeScaling(kind="dynamic", factor=2.5, original_max_context=1000),
        ),
        (
            {"rope_type": "llama3", **LLAMA3},
            RopeScaling(
                kind="llama3",
                factor=8.0,
                original_max_context=8192,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            ),
        ),
        (
            {"rope_type": "yarn", "type": "yarn", **YARN, "finetuned": True, "truncate": True},
            RopeScaling(kind="yarn", factor=4.0, original_max_context=4096),
        ),
        (
            {"type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5},
            RopeScaling(
                kind="yarn",
                factor=4.0,
                original_max_context=4096,
                beta_fast=16.0,
                beta_slow=2.0,
                attention_factor=1.5,
            ),
        ),
    ],
)
def test_both_spellings_say_the_same(read: Read, parameters: dict[str, Any], expected: RopeScaling) -> None:
    assert read(rope_theta=1e4, rope_scaling=parameters) == (1e4, expected)
    assert read(rope_parameters={"rope_theta": 1e4, **parameters}) == (1e4, expected)
    assert read(rope_theta=1e4, rope_scaling=parameters, rope_parameters=parameters) == (1e4, expected)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"mscale": 0.7, "mscale_all_dim": 1.0},
        {"mscale": 0.7},
        {"attention_factor": 1.25},
        {"factor": 1.0},
    ],
)
def test_the_attention_factor_of_yarn_is_that_of_transformers(read: Read, extra: dict[str, Any]) -> None:
    parameters = {"rope_type": "yarn", "rope_theta": 1e4, **YARN, **extra}
    config = transformers.LlamaConfig(max_position_embeddings=16384, rope_parameters=dict(parameters))
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    _, scaling = read(rope_parameters=parameters)
    assert scaling is not None
    ours = scaling.attention_factor
    if ours is None:  # the paper's rule, which `model.rope` applies
        assert not {"attention_factor", "mscale_all_dim"} & extra.keys()
    else:
        assert ours == pytest.approx(expected)


def test_an_original_context_at_the_top_level_wins(read: Read) -> None:
    _, scaling = read(rope_theta=1e4, original_max_position_embeddings=100, rope_scaling={"type": "yarn", **YARN})
    assert scaling is not None
    assert scaling.original_max_context == 100


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "'rope_theta' is missing"),
        ({"rope_parameters": {"rope_type": "default"}}, "'rope_theta' is missing"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
            r"'rope_theta' disagrees with 'rope_parameters\.rope_theta' \(1000000\.0\)",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"a": 1}},
            "'rope_scaling' and field 'rope_parameters' disagree",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear"}},
            r"'rope_scaling\.factor' is missing",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "rope_type": "yarn", **YARN}},
            r"'rope_scaling\.type' disagrees with rope_type",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 2.0}},
            r"'rope_scaling\.original_max_position_embeddings' is missing",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "llama3", **YARN}},
            r"'rope_scaling\.low_freq_factor' is missing",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", **YARN, "truncate": False}},
            r"'rope_scaling\.truncate' is false",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2, "long_factor": [1.0]}},
            r"'rope_scaling\.long_factor' is not known here",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": ["yarn"], "factor": 2}},
            r"'rope_scaling\.type' \['yarn'\] is unknown",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            r"'rope_parameters\.partial_rotary_factor' is 0\.5; only whole heads",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}, "rope_theta": 1e4},
            r"'rope_parameters\.full_attention' is not known here",
        ),
    ],
)
def test_what_is_refused(read: Read, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=rf"config\.json: field {message}"):
        read(**json.loads(json.dumps(values)))


def test_mistral_yarn(read_params: Read) -> None:
    yarn = {"factor": 16, "original_max_position_embeddings": 16384, "beta": 32.0, "alpha": 1.0}
    expected = RopeScaling(kind="yarn", factor=16.0, original_max_context=16384)
    assert read_params(rope_theta=1e6, yarn=None) == (1e6, None)
    assert read_params(rope_theta=1e6, yarn=yarn) == (1e6, expected)
    _, unscaled = read_params(rope_theta=1e6, yarn={**yarn, "apply_scale": False})
    assert unscaled is not None
    assert unscaled.attention_factor == 1.0
    with pytest.raises(ModelConfigError, match=r"'yarn\.alpha' is missing"):
        read_params(rope_theta=1e6, yarn={name: value for name, value in yarn.items() if name != "alpha"})
    with pytest.raises(ModelConfigError, match=r"'yarn\.gamma' is not known here"):
        read_params(rope_theta=1e6, yarn={**yarn, "gamma": 3})
