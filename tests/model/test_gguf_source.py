"""A GGUF file gives the same weights, numbers and logits as the model it was made of, or is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from transformers import LlamaForCausalLM

from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.rope import inverse_frequencies
from model.storage.tensor_names import tensor_specs
from model.transformer import load_local, run_local
from model.upcycling.gguf_metadata import GgufError, GgufMetadata, llama3_divisors
from model.upcycling.gguf_source import GgufSource, canonical_name, half_rotation
from tests.support.checkpoints import write_dense_llama
from tests.support.gguf_files import dense_tensors, write_gguf

SHAPE: dict[str, Any] = {"hidden": 64, "ffn": 128, "heads": 4, "kv_heads": 2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return write_dense_llama(tmp_path_factory.mktemp("dense"), **SHAPE)


@pytest.fixture(scope="module")
def source(dense: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> GgufSource:
    return GgufSource.open(write_gguf(tmp_path_factory.mktemp("gguf") / "f32.gguf", dense))


def hugging_face(name: str) -> str:
    top = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
    if name in top:
        return f"{top[name]}.weight"
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"w{x}": f"self_attn.{x}_proj" for x in "qkvo"},
        "experts.0.w1": "mlp.gate_proj",
        "experts.0.w2": "mlp.down_proj",
        "experts.0.w3": "mlp.up_proj",
    }
    _, layer, part = name.split(".", 2)
    return f"model.layers.{layer}.{parts[part]}.weight"


def test_every_tensor_comes_back_in_hugging_face_order(dense: LlamaForCausalLM, source: GgufSource) -> None:
    state = dense.state_dict()
    for spec in tensor_specs(source.config):
        tensor = source.read(spec.name)
        assert tensor.dtype == torch.float32
        assert source.shape(spec.name) == spec.shape
        assert torch.equal(tensor, state[hugging_face(spec.name)]), spec.name


def test_the_configuration_is_that_of_the_model(dense: LlamaForCausalLM, source: GgufSource) -> None:
    config = source.config
    assert (config.num_layers, config.hidden_size, config.ffn_size) == (2, 64, 128)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.num_experts, config.top_k, config.vocab_size, config.max_context) == (1, 1, 300, 512)
    assert config.norm_eps == pytest.approx(dense.config.rms_norm_eps)
    assert config.rope_theta == dense.config.rope_parameters["rope_theta"]  # type: ignore[index]
    assert config.rope_scaling is None
    assert config.sliding_window is None
    assert not config.tied_embeddings


def test_our_own_model_gives_transformers_logits(dense: LlamaForCausalLM, source: GgufSource) -> None:
    backbone, experts = load_local(source, kernel="fp32")  # type: ignore[arg-type,unused-ignore]
    ids = list(range(20, 60))
    kv = KVCache(source.config, num_blocks=2, block_size=32, dtype=torch.float32, device="cpu")
    batch = ForwardBatch.build([ids], starts=[0], block_tables=[[0, 1]], logits_rows=range(len(ids)))
    logits = run_local(backbone, batch, kv, experts)
    with torch.no_grad():
        expected = dense(torch.tensor([ids])).logits[0]
    assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (GGMLQuantizationType.F16, torch.float16),
        (GGMLQuantizationType.BF16, torch.bfloat16),
        (GGMLQuantizationType.Q8_0, torch.float16),
        (GGMLQuantizationType.Q4_1, torch.float16),
    ],
)
def test_a_stored_format_decides_the_dtype(
    dense: LlamaForCausalLM, tmp_path: Path, kind: GGMLQuantizationType, dtype: torch.dtype
) -> None:
    source = GgufSource.open(write_gguf(tmp_path / "some.gguf", dense, kind=kind))
    original = dense_tensors(dense)["blk.1.ffn_down.weight"]
    expected = quants.dequantize(quants.quantize(original, kind), kind)
    exact = source.read("layers.1.experts.0.w2", torch.float32)
    assert np.array_equal(exact.numpy(), expected)
    assert source.dtype == dtype
    assert torch.equal(source.read("layers.1.experts.0.w2"), exact.to(dtype))


def test_a_file_without_an_output_tensor_has_tied_embeddings(tmp_path: Path) -> None:
    tied = write_dense_llama(tmp_path / "dense", tied=True, **SHAPE)
    source = GgufSource.open(write_gguf(tmp_path / "tied.gguf", tied))
    assert source.config.tied_embeddings


def test_half_rotation_of_a_tiny_head() -> None:
    stored = torch.tensor([[0.0], [10.0], [1.0], [11.0]])  # a0 b0 a1 b1
    assert half_rotation(stored, num_heads=1).flatten().tolist() == [0.0, 1.0, 10.0, 11.0]


def test_canonical_names() -> None:
    assert canonical_name("blk.12.attn_q.weight") == "layers.12.wq"
    assert canonical_name("token_embd.weight") == "embed"
    assert canonical_name("blk.0.attn_q.bias") is None
    assert canonical_name("blk.0.ffn_gate_exps.weight") is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'"),
        ({"llama.expert_count": 8}, "mixture of experts already"),
        ({"llama.embedding_length": None}, "llama.embedding_length is missing"),
        ({"llama.embedding_length": "64"}, "llama.embedding_length must be a whole number"),
        ({"llama.feed_forward_length": [128, 128]}, "llama.feed_forward_length must be a whole number"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type is 'longrope'"),
        ({"llama.rope.scale_linear": 2.0}, "llama.rope.scale_linear"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "rms_epsilon is missing"),
        ({"llama.block_count": 3}, "no tensor holds layers.2.attn_norm"),
        ({"llama.feed_forward_length": 96}, r"ffn_gate.weight has shape \(128, 64\), expected \(96, 64\)"),
    ],
)
def test_a_wrong_key_is_refused_by_name(
    dense: LlamaForCausalLM, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    path = write_gguf(tmp_path / "wrong.gguf", dense, keys=keys)
    with pytest.raises(GgufError, match=message):
        GgufSource.open(path)


def test_unknown_and_missing_tensors_are_refused_by_name(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    bias = write_gguf(tmp_path / "bias.gguf", dense, tensors={"blk.0.attn_q.bias": np.zeros(64, np.float32)})
    with pytest.raises(GgufError, match=r"unknown tensor blk\.0\.attn_q\.bias"):
        GgufSource.open(bias)
    gap = write_gguf(tmp_path / "gap.gguf", dense, tensors={"blk.1.ffn_norm.weight": None})
    with pytest.raises(GgufError, match=r"no tensor holds layers\.1\.ffn_norm"):
        GgufSource.open(gap)
    bare = write_gguf(tmp_path / "bare.gguf", dense, tensors={"token_embd.weight": None})
    with pytest.raises(GgufError, match=r"token_embd\.weight is missing"):
        GgufSource.open(bare)


def test_damaged_files_are_refused(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", dense).read_bytes()
    for name, content in (
        ("short", whole[: len(whole) // 2]),
        ("header", whole[:500]),
        ("other", b"not a model at all, but long enough to be read"),
    ):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(GgufError, match=name):
            GgufSource.open(path)
    with pytest.raises(GgufError, match="no such file"):
        GgufSource.open(tmp_path / "absent.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(GgufError, match="empty"):
        GgufSource.open(tmp_path / "empty.gguf")


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_by_its_divisors(dense: LlamaForCausalLM, tmp_path: Path, factor: float) -> None:
    plain = GgufSource.open(write_gguf(tmp_path / "plain.gguf", dense)).config
    keys = {"llama.rope.freq_base": 500000.0}
    scaling = {"factor": factor, "low": 1.0, "high": 4.0, "context": 8192}
    freqs = 1.0 / 500000.0 ** (np.arange(0, plain.head_dim, 2) / plain.head_dim)
    divisors = []
    for freq in freqs:  # as convert_hf_to_gguf.py computes them
        wavelength = 2 * np.pi / freq
        smooth = (scaling["context"] / wavelength - scaling["low"]) / (scaling["high"] - scaling["low"])
        if wavelength < scaling["context"] / scaling["high"]:
            divisors.append(1.0)
        elif wavelength > scaling["context"] / scaling["low"]:
            divisors.append(factor)
        else:
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    stored = np.array(divisors, np.float32)
    path = write_gguf(tmp_path / "llama3.gguf", dense, keys=keys, tensors={"rope_freqs.weight": stored})
    config = GgufSource.open(path).config
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("llama3", factor)
    assert llama3_divisors(config.rope_scaling, plain.head_dim, 500000.0) == pytest.approx(divisors, rel=1e-6)
    assert inverse_frequencies(config)[0].numpy() == pytest.approx(freqs / stored, rel=1e-5)
    odd = write_gguf(tmp_path / "odd.gguf", dense, keys=keys, tensors={"rope_freqs.weight": stored * 3})
    with pytest.raises(GgufError, match=r"neither Llama 3\.1's nor 3\.2's"):
        GgufSource.open(odd)


def test_yarn_and_linear_scaling_and_the_window_are_read(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    keys = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 128,
        "llama.attention.sliding_window": 64,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 4,
    }
    config = GgufSource.open(write_gguf(tmp_path / "yarn.gguf", dense, keys=keys)).config
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("yarn", 4.0)
    assert config.rope_scaling.original_max_context == 128
    assert config.sliding_window == 64
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 4))


def test_metadata_refuses_the_wrong_type_by_key() -> None:
    metadata = GgufMetadata({"flag": 1, "texts": ["a", 2], "number": True, "text": 5}, "some.gguf")
    for read in (
        lambda: metadata.flag("flag", False),
        lambda: metadata.texts("texts"),
        lambda: metadata.texts("absent"),
        lambda: metadata.number("number"),
        lambda: metadata.integer("number"),
        lambda: metadata.text("text"),
    ):
        with pytest.raises(GgufError, match=r"some\.gguf: (flag|texts|absent|number|text) "):
            read()
    assert metadata.flag("absent", True)
    assert metadata.number("flag") == 1.0
    assert "absent" not in metadata
