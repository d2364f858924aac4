"""The FFN inputs that routers are made from are those of transformers and of our own serving model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.storage.checkpoint import Checkpoint
from model.transformer import load_local
from model.upcycling.calibration import ffn_inputs
from model.upcycling.calibration_text import (
    ROUND,
    calibration_windows,
    standard_library_code,
    standard_library_prose,
)
from tests.support.checkpoints import write_dense_llama, write_dense_mistral

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def windows(count: int, width: int) -> list[list[int]]:
    ids = torch.randint(5, 300, (count, width), generator=torch.Generator().manual_seed(0))
    return [list(map(int, row)) for row in ids]


@pytest.mark.parametrize("case", ["llama", "llama3 rope", "sliding window"])
def test_ffn_inputs_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    model: Any
    if case == "sliding window":
        model = write_dense_mistral(tmp_path, sliding_window=8, layers=3)
    else:
        model = write_dense_llama(tmp_path, layers=3, rope_parameters=LLAMA3 if "rope" in case else None)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    texts = windows(count=11, width=40)
    with torch.no_grad():
        model(torch.tensor(texts))
    ours = list(ffn_inputs(Checkpoint.open(tmp_path), texts))
    assert len(ours) == len(seen) == 3
    for mine, theirs in zip(ours, seen, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_ffn_inputs_are_what_our_backbone_sends_to_its_expert(tmp_path: Path) -> None:
    write_dense_llama(tmp_path, layers=3)
    checkpoint = Checkpoint.open(tmp_path)
    texts = windows(count=2, width=32)
    backbone, experts = load_local(checkpoint, kernel="fp32")
    kv = KVCache(checkpoint.config, num_blocks=2, block_size=32, dtype=torch.float32, device="cpu")
    steps = backbone.forward(ForwardBatch.build(texts, starts=[0, 0], block_tables=[[0], [1]]), kv)
    call = next(steps)
    for layer, x_WSD in enumerate(ffn_inputs(checkpoint, texts)):
        assert call.layer == layer
        assert torch.allclose(call.plan.x_ND, x_WSD.flatten(0, 1), atol=1e-4)
        if layer < 2:
            call = steps.send(experts.run(call.layer, call.plan))


def characters(text: str) -> list[int]:
    return [ord(char) for char in text]


def test_windows_are_rounds_of_prose_and_code_spread_over_the_text() -> None:
    cut = calibration_windows(characters, num_windows=12, window_tokens=100)
    texts = ["".join(map(chr, window)) for window in cut]
    prose, code = standard_library_prose(), standard_library_code()
    assert [len(text) for text in texts] == [100] * 12
    assert len(set(texts)) == 12
    for index, text in enumerate(texts):
        whole = code if index % ROUND == ROUND - 1 else prose
        assert whole[whole.index(text) - 1] == "\n"
    assert prose.index(texts[0]) < 1000
    assert prose.index(texts[10]) > len(prose) * 3 // 4


def test_windows_are_the_same_every_time() -> None:
    first = calibration_windows(characters, num_windows=8, window_tokens=50)
    assert first == calibration_windows(characters, num_windows=8, window_tokens=50)


def test_more_windows_than_there_is_text_are_refused() -> None:
    with pytest.raises(ValueError, match="too few for 30000 windows of 1000"):
        calibration_windows(characters, num_windows=40_000, window_tokens=1000)
