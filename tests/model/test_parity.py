"""The same numbers as transformers, over the shapes of the family: logits within 1e-4 and the same greedy text."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from model.batch import ForwardBatch
from model.storage.checkpoint import Checkpoint
from tests.support.checkpoints import (
    write_dense_llama,
    write_dense_mistral,
    write_mistral_consolidated,
    write_mixtral,
)
from tests.support.paged import PagedModel, random_ids

TOLERANCE = 1e-4
PROMPT = 150
GREEDY = 24

MIXTRALS: dict[str, dict[str, Any]] = {
    "gqa-2": {},
    "mha": {"kv_heads": 4},
    "mqa": {"kv_heads": 1},
    "eight-experts": {"experts": 8},
    "top-1": {"top_k": 1},
    "eight-experts-top-1": {"experts": 8, "top_k": 1},
    "top-3": {"top_k": 3},
    "window": {"sliding_window": 40},
    "window-of-one-tile": {"sliding_window": 128},
    "tied": {"tied": True},
    "sharded": {"max_shard_size": 100_000},
    "fused-experts": {"fused": True},
    "odd-shapes": {"hidden": 72, "ffn": 112, "head_dim": 18},
    "narrow-heads": {"hidden": 60, "ffn": 52, "heads": 6, "kv_heads": 3, "head_dim": 10},
    "wide-heads": {"head_dim": 32},
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn-rope": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
        },
    },
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    "fp16": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
    "bf16-eight-experts-tied-window": {
        "dtype": torch.bfloat16,
        "experts": 8,
        "tied": True,
        "sliding_window": 33,
    },
}


@torch.no_grad()
def reference_logits(reference: transformers.PreTrainedModel, ids: list[int]) -> Tensor:
    logits: Tensor = reference.forward(torch.tensor([ids])).logits[0]
    return logits


def assert_parity(reference: Any, path: Path, kernel: str | None = None) -> PagedModel:
    model = PagedModel(path, kernel=kernel)
    ids = random_ids(PROMPT)
    expected = reference_logits(reference, ids)
    assert float(expected.std()) > 0.5, "logits that hardly differ would prove nothing"
    torch.testing.assert_close(model.score(ids, chunk=64), expected, rtol=0, atol=TOLERANCE)
    generated = reference.generate(torch.tensor([ids]), max_new_tokens=GREEDY, do_sample=False, eos_token_id=None)
    assert model.greedy(ids, GREEDY) == generated[0, PROMPT:].tolist()
    return model


@pytest.mark.parametrize("name", sorted(MIXTRALS))
def test_mixtral(tmp_path: Path, name: str) -> None:
    assert_parity(write_mixtral(tmp_path, **MIXTRALS[name]), tmp_path)


@pytest.mark.parametrize("kernel", ["fp32", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_lose_nothing(tmp_path: Path, kernel: str, dtype: torch.dtype) -> None:
    model = assert_parity(write_mixtral(tmp_path, dtype=dtype), tmp_path, kernel)
    assert model.backbone.kernel == kernel


@pytest.mark.parametrize("tied", [False, True])
def test_dense_llama_is_the_model_of_one_expert(tmp_path: Path, tied: bool) -> None:
    model = assert_parity(write_dense_llama(tmp_path, tied=tied, kv_heads=1), tmp_path)
    assert model.config.num_experts == 1


def test_dense_mistral_with_a_window(tmp_path: Path) -> None:
    assert_parity(write_dense_mistral(tmp_path, sliding_window=50), tmp_path)


def test_consolidated_checkpoints_of_mistral(tmp_path: Path) -> None:
    reference = write_mixtral(tmp_path / "hf")
    write_mistral_consolidated(tmp_path / "mistral", reference)
    assert_parity(reference, tmp_path / "mistral")


def test_a_long_context_of_several_bands(tmp_path: Path) -> None:
    reference = write_mixtral(tmp_path, layers=1, hidden=32, ffn=32, heads=2, kv_heads=1, max_context=4096)
    model = PagedModel(tmp_path)
    ids = random_ids(2300)
    expected = reference_logits(reference, ids)
    torch.testing.assert_close(model.score(ids, chunk=700), expected, rtol=0, atol=TOLERANCE)


def test_router_choices_equal_transformers(tmp_path: Path) -> None:
    reference = write_mixtral(tmp_path, experts=8, layers=2)
    ids = random_ids(100)
    with torch.no_grad():
        router_logits = reference(torch.tensor([ids]), output_router_logits=True).router_logits
    model = PagedModel(tmp_path)
    steps = model.backbone.forward(_prompt(ids), model.kv)
    call = next(steps)
    for layer, logits_TE in enumerate(router_logits):
        chosen_TE = torch.zeros(100, 8).scatter_(1, logits_TE.topk(2).indices, 1.0)
        assert call.layer == layer
        assert call.plan.counts == tuple(chosen_TE.sum(0).int().tolist())
        if layer + 1 < len(router_logits):
            call = steps.send(model.experts.run(call.layer, call.plan))


def _prompt(ids: list[int]) -> ForwardBatch:
    return ForwardBatch.build([ids], [0], [list(range(4))])


def test_the_reference_is_what_is_on_disk(tmp_path: Path) -> None:
    """The oracle must hold the stored values, or agreement would mean less than it says."""
    reference = write_mixtral(tmp_path, dtype=torch.bfloat16)
    stored = Checkpoint.open(tmp_path).read("layers.1.wo", torch.float32)
    assert torch.equal(stored, reference.state_dict()["model.layers.1.self_attn.o_proj.weight"])
