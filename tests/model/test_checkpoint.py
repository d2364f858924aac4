"""Checkpoints in every layout: the same tensors for the same owners, exact byte ranges, refusals by name."""

import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfigError
from model.storage.checkpoint import COORDINATOR, Checkpoint, CheckpointError, Expert
from tests.support.checkpoints import (
    write_dense_llama,
    write_dense_mistral,
    write_mistral_consolidated,
    write_mixtral,
)

ROOT = Path(__file__).parents[2]
Edit = Callable[[dict[str, Tensor]], None]


def expected_tensors(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of a transformers model under this house's names."""
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "wq",
        "self_attn.k_proj": "wk",
        "self_attn.v_proj": "wv",
        "self_attn.o_proj": "wo",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate": "gate",
        "mlp.gate_proj": "experts.0.w1",
        "mlp.down_proj": "experts.0.w2",
        "mlp.up_proj": "experts.0.w3",
    }
    state = model.state_dict()
    expected = {"embed": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"]}
    if not model.config.tie_word_embeddings:
        expected["lm_head"] = state["lm_head.weight"]
    for name, tensor in state.items():
        if not name.startswith("model.layers."):
            continue
        layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        if part == "mlp.experts.gate_up_proj":
            for expert, both in enumerate(tensor):
                w1, w3 = both.chunk(2)
                expected[f"layers.{layer}.experts.{expert}.w1"] = w1
                expected[f"layers.{layer}.experts.{expert}.w3"] = w3
        elif part == "mlp.experts.down_proj":
            for expert, w2 in enumerate(tensor):
                expected[f"layers.{layer}.experts.{expert}.w2"] = w2
        else:
            expected[f"layers.{layer}.{parts[part]}"] = tensor
    return expected


def all_names(checkpoint: Checkpoint) -> list[str]:
    return [name for owner in checkpoint.owners for name in checkpoint.names(owner)]


def assert_holds(checkpoint: Checkpoint, model: transformers.PreTrainedModel) -> None:
    expected = expected_tensors(model)
    assert sorted(all_names(checkpoint)) == sorted(expected)
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.read(name, dtype=torch.float32), tensor), name


def edit(path: Path, change: Edit) -> None:
    """Rewrite a safetensors file with its tensors changed."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(model_dir: Path, **changes: Any) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"fused": True},
        {"max_shard_size": "100KB"},
        {"fused": True, "max_shard_size": "100KB", "experts": 8},
        {"tied": True, "dtype": torch.float16},
        {"heads": 8, "kv_heads": 1, "head_dim": 24, "dtype": torch.bfloat16},
        {"experts": 2, "top_k": 1, "kv_heads": 4, "vocab": 77, "layers": 3},
        {"experts": 1, "top_k": 1},
        {"experts": 1, "top_k": 1, "fused": True},
    ],
    ids=str,
)
def test_mixtral_in_hugging_face_and_mistral_layout(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = write_mixtral(tmp_path / "hf", **shape)
    if model.config.num_local_experts == 1:
        drop_lone_routers(model)
    assert_holds(Checkpoint.open(tmp_path / "hf"), model)
    dtype = shape.get("dtype", torch.float32)
    write_mistral_consolidated(tmp_path / "mistral", model, dtype=dtype)
    consolidated = Checkpoint.open(tmp_path / "mistral")
    assert consolidated.dtype == dtype
    assert_holds(consolidated, model)


def drop_lone_routers(model: transformers.PreTrainedModel) -> None:
    """A router over one expert decides nothing and is not read."""
    for layer in model.model.layers:
        del layer.mlp.gate


@pytest.mark.parametrize("write", [write_dense_llama, write_dense_mistral])
def test_dense_models_are_one_expert(tmp_path: Path, write: Callable[..., transformers.PreTrainedModel]) -> None:
    model = write(tmp_path / "hf", tied=True)
    assert_holds(Checkpoint.open(tmp_path / "hf"), model)
    write_mistral_consolidated(tmp_path / "mistral", model)
    checkpoint = Checkpoint.open(str(tmp_path / "mistral"))
    assert_holds(checkpoint, model)
    assert checkpoint.config.num_experts == 1


def test_owners_share_everything_and_nothing_twice(tmp_path: Path) -> None:
    write_mixtral(tmp_path, dtype=torch.bfloat16, fused=True)
    checkpoint = Checkpoint.open(tmp_path)
    names = all_names(checkpoint)
    assert len(names) == len(set(names))
    assert checkpoint.owner("layers.1.gate") == checkpoint.owner("embed") == COORDINATOR
    assert checkpoint.owner("layers.1.experts.3.w2") == Expert(3)
    assert checkpoint.names(Expert(2)) == tuple(
        f"layers.{layer}.experts.2.{part}" for layer in (0, 1) for part in ("w1", "w2", "w3")
    )
    assert checkpoint.names(Expert(4)) == ()
    assert checkpoint.nbytes("layers.0.experts.0.w1") == 112 * 64 * 2
    assert checkpoint.owned_bytes(Expert(1)) == 2 * 3 * 112 * 64 * 2
    assert checkpoint.owners == (COORDINATOR, Expert(0), Expert(1), Expert(2), Expert(3))
    owned = [checkpoint.owned_bytes(owner) for owner in checkpoint.owners]
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(owned) == sum(tensor.nbytes for tensor in stored.values())


def test_a_name_that_no_model_has(tmp_path: Path) -> None:
    write_mixtral(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    for ask in (checkpoint.read, checkpoint.owner, checkpoint.shape, checkpoint.nbytes):
        with pytest.raises(CheckpointError, match=r"no tensor named 'layers\.2\.wq'"):
            ask("layers.2.wq")


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(tmp_path: Path, stored: torch.dtype, target: torch.dtype) -> None:
    model = write_mixtral(tmp_path, dtype=stored)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.dtype == stored
    weight = model.state_dict()["model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(checkpoint.read("layers.0.wv"), weight.to(stored))
    assert torch.equal(checkpoint.read("layers.0.wv", dtype=target), weight.to(stored).to(target))


def test_the_dtype_of_mixed_weights_holds_them_all(tmp_path: Path) -> None:
    write_mixtral(tmp_path, dtype=torch.bfloat16)
    path = tmp_path / "model.safetensors"

    def router_and_norms_in_fp32(tensors: dict[str, Tensor]) -> None:
        tensors.update({n: t.float() for n, t in tensors.items() if "gate.weight" in n or "norm" in n})

    edit(path, router_and_norms_in_fp32)
    assert Checkpoint.open(tmp_path).dtype == torch.bfloat16
    half = "model.layers.0.self_attn.v_proj.weight"
    edit(path, lambda tensors: tensors.update({half: tensors[half].half()}))
    assert Checkpoint.open(tmp_path).dtype == torch.float32


def test_rows_of_a_head_larger_than_a_slice_are_reordered(tmp_path: Path) -> None:
    """One head of 2304 rows of 2048 floats takes 18 MiB, so that its pairs come in three slices."""
    model = write_dense_llama(
        tmp_path / "hf", layers=1, hidden=2048, heads=1, kv_heads=1, head_dim=2304, ffn=8, vocab=16
    )
    write_mistral_consolidated(tmp_path / "mistral", model)
    checkpoint = Checkpoint.open(tmp_path / "mistral")
    expected = expected_tensors(model)
    for name in ("layers.0.wq", "layers.0.wk", "layers.0.wv"):
        assert torch.equal(checkpoint.read(name), expected[name])
    half = checkpoint.read("layers.0.wq", dtype=torch.bfloat16)
    assert torch.equal(half, expected["layers.0.wq"].bfloat16())


def test_an_old_buffer_is_ignored(tmp_path: Path) -> None:
    write_mixtral(tmp_path)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit(tmp_path / "model.safetensors", lambda tensors: tensors.update(buffer))
    assert Checkpoint.open(tmp_path).names(COORDINATOR)


def without(name: str) -> Edit:
    return lambda tensors: tensors.__delitem__(name)


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
REFUSED: dict[str, tuple[Edit, str]] = {
    "missing": (
        without(EXPERT),
        r"'layers\.1\.experts\.2\.w1' is missing .looked for '" + EXPERT,
    ),
    "missing head": (without("lm_head.weight"), "'lm_head' is missing"),
    "missing norm": (without("model.norm.weight"), "'norm' is missing"),
    "unknown": (lambda t: t.update({"model.extra.weight": torch.ones(1)}), "'model.extra.weight' is unknown"),
    "bias": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        "'model.layers.0.self_attn.q_proj.bias' is unknown",
    ),
    "a layer too many": (
        lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(64)}),
        "'model.layers.2.input_layernorm.weight' is unknown",
    ),
    "an expert too many": (
        lambda t: t.update({EXPERT.replace("experts.2", "experts.4"): torch.ones(112, 64)}),
        "experts.4.w1.weight' is unknown",
    ),
    "duplicated": (
        lambda t: t.update({"model.layers.0.mlp.gate.weight": torch.ones(4, 64)}),
        "'model.layers.0.mlp.gate.weight' duplicates 'model.layers.0.block_sparse_moe.gate.weight'",
    ),
    "duplicated in a fused tensor": (
        lambda t: t.update({"model.layers.1.mlp.experts.gate_up_proj": torch.ones(4, 224, 64)}),
        "experts.gate_up_proj' duplicates 'model.layers.1.block_sparse_moe.experts.0.w1.weight'",
    ),
    "misshaped": (
        lambda t: t.update({EXPERT: torch.ones(64, 112)}),
        rf"'{EXPERT}': has shape \[64, 112\], the configuration asks for \[112, 64\]",
    ),
    "quantized": (
        lambda t: t.update({EXPERT: torch.ones(112, 64, dtype=torch.int8)}),
        rf"'{EXPERT}': has dtype torch.int8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_are_refused_by_name(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    write_mixtral(tmp_path)
    edit(tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_fused_tensor_of_another_number_of_experts(tmp_path: Path) -> None:
    write_mixtral(tmp_path, fused=True)
    edit_config(tmp_path, num_local_experts=8)
    with pytest.raises(CheckpointError, match=r"gate\.weight': has shape \[4, 64\], .* asks for \[8, 64\]"):
        Checkpoint.open(tmp_path)


def test_a_configuration_of_absurd_size_is_refused_at_once(tmp_path: Path) -> None:
    write_mixtral(tmp_path)
    edit_config(tmp_path, num_hidden_layers=2**50)
    with pytest.raises(CheckpointError, match=r"'layers\.2\.attn_norm' is missing"):
        Checkpoint.open(tmp_path)


def test_a_truncated_shard_and_a_bad_configuration(tmp_path: Path) -> None:
    write_mixtral(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{shard.name}: tensor '.*': truncated"):
        Checkpoint.open(tmp_path)
    edit_config(tmp_path, hidden_act="gelu")
    with pytest.raises(ModelConfigError, match="hidden_act"):
        Checkpoint.open(tmp_path)


def test_a_shard_that_goes_after_opening(tmp_path: Path) -> None:
    write_mixtral(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: No such file"):
        checkpoint.read("embed")


def test_tied_embeddings_may_be_kept_twice_only_if_they_are_the_same(tmp_path: Path) -> None:
    model = write_mixtral(tmp_path, tied=True, vocab=40_000)  # 9.8 MiB: more than one slice
    embed = model.state_dict()["model.embed_tokens.weight"]
    path = tmp_path / "model.safetensors"
    edit(path, lambda tensors: tensors.update({"lm_head.weight": embed.clone()}))
    checkpoint = Checkpoint.open(tmp_path)
    assert "lm_head" not in all_names(checkpoint)
    assert torch.equal(checkpoint.read("embed"), embed)
    other = embed.clone()
    other[-1, -1] += 1
    edit(path, lambda tensors: tensors.update({"lm_head.weight": other}))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read("norm").shape == (64,)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"):
        checkpoint.read("embed")
    edit(path, lambda tensors: tensors.update({"output.weight": embed.clone()}))
    with pytest.raises(CheckpointError, match=r"'output\.weight' duplicates 'lm_head\.weight'"):
        Checkpoint.open(tmp_path)
    edit(path, lambda tensors: tensors.update({"lm_head.weight": embed.clone()[:-1]}))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight': has shape"):
        Checkpoint.open(tmp_path)


def test_the_weights_id_follows_the_weights(tmp_path: Path) -> None:
    """Else two models of one shape would claim the same fingerprint, and so the same tokens."""
    write_mixtral(tmp_path / "a", seed=1)
    write_mixtral(tmp_path / "b", seed=2)
    first, second = Checkpoint.open(tmp_path / "a"), Checkpoint.open(tmp_path / "b")
    assert first.weights_id == Checkpoint.open(tmp_path / "a").weights_id != second.weights_id
    assert pickle.loads(pickle.dumps(first)).weights_id == first.weights_id


def test_the_weights_id_follows_configuration_and_headers(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_mixtral(tmp_path / name)
    write_mixtral(tmp_path / "c", dtype=torch.float16)
    first, second, third = (Checkpoint.open(tmp_path / name).weights_id for name in "abc")
    assert first == second != third
    assert len(first) == 64
    edit_config(tmp_path / "b", rope_theta=1e4, rope_parameters=None)
    assert Checkpoint.open(tmp_path / "b").weights_id != first


def test_a_checkpoint_travels_to_other_processes_and_threads(tmp_path: Path) -> None:
    model = write_mixtral(tmp_path, fused=True, experts=8)
    checkpoint: Checkpoint = pickle.loads(pickle.dumps(Checkpoint.open(tmp_path)))
    names = all_names(checkpoint)
    with ThreadPoolExecutor(4) as pool:
        tensors = dict(zip(names, pool.map(checkpoint.read, names), strict=True))
    for name, tensor in expected_tensors(model).items():
        assert torch.equal(tensors[name], tensor)


LARGE_FFN = 2560


@pytest.mark.parametrize("fused", [False, True])
def test_an_actor_reads_its_own_bytes_and_holds_little_more(tmp_path: Path, fused: bool) -> None:
    """Two processes at a time read an expert each of a checkpoint of 126 MB.

    They open and read no byte beyond their own (and the headers), and their memory grows by their weights and
    at most one tensor, converted or not.
    """
    write_large(tmp_path, fused=fused)
    total = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert total > 125_000_000
    tries = [read_at_once(tmp_path)]
    while len(tries) < 4 and any(beyond(report) > 0 for report in tries[-1]):  # the system counts in lots
        tries.append(read_at_once(tmp_path))
    reports = tries[-1]
    for report, itemsize in zip(reports, (4, 2), strict=True):
        assert report["owned_bytes"] == 2 * 3 * 512 * LARGE_FFN * 2
        assert report["held_bytes"] == 2 * 3 * 512 * LARGE_FFN * itemsize
        assert report["owned_bytes"] <= report["read_bytes"] <= report["owned_bytes"] + 10_000
        assert report["open_bytes"] < 100_000
        assert beyond(report) <= 0, report
    assert reports[0]["digest"] == digest(tmp_path, Expert(0), torch.float32)
    assert reports[1]["digest"] == digest(tmp_path, Expert(7), torch.bfloat16)
    assert reports[1]["digest"] != digest(tmp_path, Expert(0), torch.bfloat16)


def read_at_once(model_dir: Path) -> list[dict[str, Any]]:
    """What two processes say that each read an expert."""
    reports = []
    for process in [read_in_process(model_dir, 0, "float32"), read_in_process(model_dir, 7, "bfloat16")]:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        reports.append(json.loads(out))
    return reports


def beyond(report: dict[str, Any]) -> int:
    """Bytes that its memory grew by beyond its weights, one tensor, and what is the allocator's and interpreter's."""
    slack = 2 << 20
    allowed: int = report["held_bytes"] + max(report["largest_bytes"], 8 << 20) + slack
    return int(report["peak_bytes"]) - allowed


def digest(model_dir: Path, owner: Expert, dtype: torch.dtype) -> str:
    checkpoint = Checkpoint.open(model_dir)
    column = [checkpoint.read(name, dtype) for name in checkpoint.names(owner)]
    return hashlib.sha256(b"".join(t.view(-1).view(torch.uint8).numpy().tobytes() for t in column)).hexdigest()


def write_large(dest: Path, *, fused: bool) -> None:
    """Two layers of eight experts in bfloat16, 126 MB: a small model's experts, blown up from 10 rows to 2560."""
    write_mixtral(dest, hidden=512, ffn=10, heads=8, kv_heads=2, experts=8, fused=fused, dtype=torch.bfloat16)
    edit_config(dest, intermediate_size=LARGE_FFN)
    grown = {10: LARGE_FFN, 20: 2 * LARGE_FFN}

    def grow(tensors: dict[str, Tensor]) -> None:
        for number, (name, tensor) in enumerate(tensors.items()):
            if ".experts." in name:
                shape = [grown.get(size, size) for size in tensor.shape]
                values = torch.arange(number, number + math.prod(shape), dtype=torch.int32)
                tensors[name] = values.bfloat16().view(shape)

    edit(dest / "model.safetensors", grow)


def read_in_process(model_dir: Path, expert: int, dtype: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.read_expert", str(model_dir), str(expert), dtype],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
