"""Configurations as Hugging Face and Mistral write them, and everything that makes one unusable."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.config import ModelConfig, ModelConfigError
from model.storage.config_reader import config_path, read_config
from tests.support.checkpoints import write_mistral_consolidated, write_mixtral

# Mixtral-8x7B-v0.1's own file, as published (transformers 4).
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
PARAMS: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
    "rope_theta": 1000000.0,
    "max_seq_len": 32768,
    "moe": {"num_experts": 8, "num_experts_per_tok": 2},
}
ABSENT = object()


def written(path: Path, base: dict[str, Any], changes: dict[str, Any]) -> Path:
    content = {name: value for name, value in {**base, **changes}.items() if value is not ABSENT}
    path.write_text(json.dumps(content))
    return path.parent


@pytest.fixture
def hugging_face(tmp_path: Path) -> Callable[..., ModelConfig]:
    """Reads Mixtral's config.json with some fields changed."""
    return lambda **changes: read_config(written(tmp_path / "config.json", MIXTRAL, changes))


@pytest.fixture
def mistral(tmp_path: Path) -> Callable[..., ModelConfig]:
    """Reads Mixtral's params.json with some fields changed."""
    return lambda **changes: read_config(written(tmp_path / "params.json", PARAMS, changes))


def test_mixtral_as_published(hugging_face: Callable[..., ModelConfig]) -> None:
    assert hugging_face() == ModelConfig(
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=14336,
        num_experts=8,
        top_k=2,
        vocab_size=32000,
        max_context=32768,
        norm_eps=1e-5,
        rope_theta=1e6,
        rope_scaling=None,
        sliding_window=None,
        tied_embeddings=False,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_params_say_the_same_but_the_token_ids(
    hugging_face: Callable[..., ModelConfig], mistral: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    ours = mistral()
    assert (ours.bos_token_id, ours.eos_token_ids) == (None, ())
    theirs = hugging_face(bos_token_id=ABSENT, eos_token_id=None)
    assert config_path(tmp_path).name == "config.json"  # which wins where both are there
    assert ours == theirs


def test_what_transformers_writes_today(tmp_path: Path) -> None:
    model = write_mixtral(tmp_path / "hf", sliding_window=40, experts=8, top_k=1, tied=True, head_dim=32)
    config = read_config(tmp_path / "hf")
    assert (config.num_experts, config.top_k, config.head_dim) == (8, 1, 32)
    assert (config.sliding_window, config.tied_embeddings, config.max_context) == (40, True, 512)
    assert (config.rope_theta, config.rope_scaling, config.eos_token_ids) == (1e6, None, (2,))
    write_mistral_consolidated(tmp_path / "mistral", model)
    again = read_config(tmp_path / "mistral")
    assert (again.num_experts, again.top_k, again.head_dim) == (8, 1, 32)
    assert (again.sliding_window, again.tied_embeddings, again.max_context) == (40, True, 512)


@pytest.mark.parametrize("config_class", [transformers.LlamaConfig, transformers.MistralConfig])
def test_dense_models_have_one_expert(tmp_path: Path, config_class: type[Any]) -> None:
    name = config_class.__name__.replace("Config", "ForCausalLM")
    config_class(architectures=[name], vocab_size=300).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert (config.num_experts, config.top_k, config.is_moe) == (1, 1, False)
    assert config.sliding_window == (4096 if config_class is transformers.MistralConfig else None)


HF_REQUIRED = [
    "architectures",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_local_experts",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
    "eos_token_id",
]


@pytest.mark.parametrize("field", HF_REQUIRED)
def test_a_missing_field_is_named(hugging_face: Callable[..., ModelConfig], field: str) -> None:
    with pytest.raises(ModelConfigError, match=rf"config\.json: field '{field}' is missing"):
        hugging_face(**{field: ABSENT})


def test_a_missing_base_comes_with_the_published_ones(
    hugging_face: Callable[..., ModelConfig], mistral: Callable[..., ModelConfig]
) -> None:
    with pytest.raises(ModelConfigError, match=r"'rope_theta' is missing; .*Mixtral was trained with 1000000\.0"):
        mistral(rope_theta=ABSENT)
    with pytest.raises(ModelConfigError, match=r"'rope_theta' is missing; .*Llama 2 were trained with 10000\.0"):
        hugging_face(rope_theta=ABSENT)


@pytest.mark.parametrize("field", [name for name in PARAMS if name not in ("moe", "max_seq_len")])
def test_a_missing_param_is_named(mistral: Callable[..., ModelConfig], field: str) -> None:
    with pytest.raises(ModelConfigError, match=rf"params\.json: field '{field}' is missing"):
        mistral(**{field: ABSENT})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", "4096", "must be an integer, got '4096'"),
        ("hidden_size", 4096.0, "must be an integer"),
        ("num_hidden_layers", True, "must be an integer, got True"),
        ("vocab_size", 10**30, "must be an integer, got a huge integer"),
        ("num_local_experts", None, "must be an integer, got None"),
        ("rms_norm_eps", "1e-5", "must be a number"),
        ("rms_norm_eps", 0, "must be above 0"),
        ("rope_theta", -1.0, "must be above 0"),
        ("rope_theta", None, "must be a number"),
        ("tie_word_embeddings", "yes", "must be true or false"),
        ("sliding_window", 4096.5, "must be an integer"),
        ("eos_token_id", "2", "must hold integers"),
        ("eos_token_id", [2, 32000], "from 0 to 31999, got 32000"),
        ("eos_token_id", [2, True], "got True"),
        ("bos_token_id", [1, 2], "must be one id or null"),
        ("architectures", "MixtralForCausalLM", "list of one name"),
        ("architectures", [], "list of one name"),
        ("architectures", ["Qwen3MoeForCausalLM"], "'Qwen3MoeForCausalLM' is unknown; known: Mixtral"),
        ("model_type", "llama", "is 'llama'; supported: mixtral"),
        ("hidden_act", "gelu", "'gelu' is unknown; known: silu"),
        ("attention_bias", True, "biases are not supported"),
        ("mlp_bias", True, "biases are not supported"),
        ("rope_interleaved", True, "only the half-rotation order"),
        ("quantization_config", {"quant_method": "awq"}, "quantized checkpoints are not supported"),
        ("partial_rotary_factor", 0.5, "only whole heads"),
        ("layer_types", ["full_attention", "sliding_attention"], "must be all 'full_attention'"),
        ("rope_scaling", [], "must be an object"),
        ("rope_scaling", {"rope_type": "longrope", "factor": 2.0}, "'longrope' is unknown; known: default"),
    ],
)
def test_a_bad_value_is_named(
    hugging_face: Callable[..., ModelConfig], field: str, value: object, message: str
) -> None:
    with pytest.raises(ModelConfigError, match=rf"config\.json: field '{field}(\.\w+)?' .*{message}"):
        hugging_face(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 5}, "num_heads .32. must be a multiple of num_kv_heads .5."),
        ({"num_experts_per_tok": 9}, "top_k .9. must not exceed num_experts .8."),
        ({"num_hidden_layers": 0}, "num_layers must be at least 1"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"head_dim": 31}, "head_dim must be even"),
        ({"num_attention_heads": 24}, "'head_dim' is missing, and hidden_size .4096. is not a multiple"),
        ({"num_attention_heads": 0}, "'head_dim' is missing"),
    ],
)
def test_contradictions_name_the_file(
    hugging_face: Callable[..., ModelConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelConfigError, match=rf"config\.json: .*{message}"):
        hugging_face(**changes)


def test_what_null_and_absence_mean(hugging_face: Callable[..., ModelConfig]) -> None:
    config = hugging_face(
        head_dim=None,
        num_key_value_heads=None,
        bos_token_id=ABSENT,
        eos_token_id=None,
        sliding_window=ABSENT,
        tie_word_embeddings=ABSENT,
        quantization_config=None,
        attention_bias=False,
        layer_types=["full_attention"] * 32,
    )
    assert (config.head_dim, config.num_kv_heads) == (128, 32)
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())
    assert (config.sliding_window, config.tied_embeddings) == (None, False)


def test_an_absent_sliding_window_means_different_things_to_different_classes(
    hugging_face: Callable[..., ModelConfig],
) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    with pytest.raises(ModelConfigError, match="'sliding_window' is missing; state its tokens, or null"):
        hugging_face(**mistral, sliding_window=ABSENT)
    assert hugging_face(**mistral, sliding_window=4096).sliding_window == 4096
    with pytest.raises(ModelConfigError, match="LlamaForCausalLM has no sliding window"):
        hugging_face(architectures=["LlamaForCausalLM"], model_type="llama", sliding_window=4096)


def test_end_tokens_of_both_files_are_united(
    hugging_face: Callable[..., ModelConfig], mistral: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"eos_token_id": [7, 2, 9]}')
    assert mistral().eos_token_ids == (7, 2, 9)
    assert hugging_face(eos_token_id=[2, 5]).eos_token_ids == (2, 5, 7, 9)
    assert hugging_face(eos_token_id=ABSENT).eos_token_ids == (7, 2, 9)
    generation.write_text('{"eos_token_id": 32000}')
    with pytest.raises(ModelConfigError, match=r"generation_config\.json: field 'eos_token_id'"):
        hugging_face()
    generation.write_text("{}")
    assert hugging_face().eos_token_ids == (2,)


def test_params_of_a_dense_model(mistral: Callable[..., ModelConfig]) -> None:
    config = mistral(moe=ABSENT, sliding_window=4096, tied_embeddings=True, max_position_embeddings=1000)
    assert (config.num_experts, config.top_k) == (1, 1)
    assert (config.sliding_window, config.tied_embeddings) == (4096, True)
    assert config.max_context == 1000  # the smaller of the two that are stated


def test_params_that_bound_no_context_have_that_of_mistral_inference(mistral: Callable[..., ModelConfig]) -> None:
    assert mistral(max_seq_len=ABSENT).max_context == 128_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": {"num_experts": 8}}, r"'moe\.num_experts_per_tok' is missing"),
        ({"moe": [8, 2]}, "'moe' must be an object"),
        ({"moe": {**PARAMS["moe"], "num_shared_experts": 1}}, r"'moe\.num_shared_experts' is not known"),
        ({"vision_encoder": {"hidden_size": 1024}}, "'vision_encoder' is not known here"),
        ({"q_lora_rank": 1536}, "'q_lora_rank' is not known here"),
        ({"use_biases": True}, "'use_biases' is not known here"),
        ({"model_type": "mamba"}, "'model_type' is 'mamba'; supported: transformer"),
        ({"activation": "gelu"}, "'activation' is 'gelu'; supported: silu"),
        ({"sliding_window": [4096, None]}, "'sliding_window' must be an integer"),
    ],
)
def test_params_that_cannot_be_computed(
    mistral: Callable[..., ModelConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelConfigError, match=rf"params\.json: field {message}"):
        mistral(**changes)


def test_params_that_change_nothing_may_stand(mistral: Callable[..., ModelConfig]) -> None:
    harmless = {"max_batch_size": 8, "use_biases": False, "lora": None, "model_type": "transformer"}
    assert mistral(**harmless, activation="silu", dtype="bfloat16") == mistral()


def test_directories_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"neither config\.json nor params\.json"):
        read_config(tmp_path)
    with pytest.raises(ModelConfigError, match="nowhere is not a directory"):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "not valid JSON"), ('{"a": 1, "a": 2}', "'a' appears twice"), ("[]", "expected a JSON object")],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelConfigError, match=rf"config\.json: .*{message}"):
        read_config(tmp_path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(st.data())
def test_no_value_of_any_field_raises_anything_else(tmp_path: Path, data: st.DataObject) -> None:
    base, name = data.draw(st.sampled_from([(MIXTRAL, "config.json"), (PARAMS, "params.json")]))
    (tmp_path / "config.json").unlink(missing_ok=True)
    extra = ["rope_scaling", "rope_parameters", "yarn", "head_dim", "layer_types", "quantization_config"]
    field = data.draw(st.sampled_from([*base, *extra]))
    model_dir = written(tmp_path / name, base, {field: data.draw(JSON_VALUES)})
    try:
        read_config(model_dir)
    except ModelConfigError as error:
        named = name in str(error)
    else:
        named = True
    assert named
