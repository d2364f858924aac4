"""Random checkpoints in a real model's shapes, made small here; and the kernel alone on one of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.engine_bench.failures import BenchError
from experiments.engine_bench.kernel_speed import KernelSpeed, draw_rows, start_kernel_speed
from experiments.engine_bench.synthetic import (
    MIXTRAL,
    SHAPES,
    ensure_synthetic,
    synthetic_model,
    weight_bytes,
    write_random,
)
from model.storage.checkpoint import Checkpoint
from model.transformer import load_local

TINY = replace(
    MIXTRAL, num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=96, vocab_size=128
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("synthetic") / "tiny"
    write_random(TINY, path)
    return path


def test_mixtral_is_mixtral() -> None:
    two_layers = replace(SHAPES["mixtral"], num_layers=2)
    experts = 2 * 8 * 3 * 4096 * 14336
    attention = 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096)
    rest = 2 * 32000 * 4096 + 2 * (8 * 4096 + 2 * 4096) + 4096
    assert weight_bytes(two_layers) == 2 * (experts + attention + rest)


def test_the_checkpoint_opens_runs_and_is_the_same_each_time(tiny: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    assert checkpoint.config == TINY
    assert checkpoint.dtype == torch.float16
    load_local(checkpoint)
    assert checkpoint.read("layers.1.ffn_norm").eq(1).all()
    assert 0.01 < float(checkpoint.read("layers.1.experts.3.w2", torch.float32).std()) < 0.03
    write_random(TINY, tmp_path / "again")
    assert Checkpoint.open(tmp_path / "again").weights_id == checkpoint.weights_id


def test_it_is_made_once_and_whole(tmp_path: Path) -> None:
    said: list[str] = []
    path = ensure_synthetic(TINY, "tiny", tmp_path, said.append)
    assert ensure_synthetic(TINY, "tiny", tmp_path, said.append) == path
    assert list(tmp_path.iterdir()) == [path]
    assert len(said) == 1
    assert "random weights" in said[0]
    assert path.name == "tiny-3-layers-random-v1"


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="--synthetic is 'gpt', but must be one of mixtral"):
        synthetic_model("gpt", 2, tmp_path, lambda text: None)
    with pytest.raises(BenchError, match=r"needs .* GB, where .* GB are free"):
        ensure_synthetic(replace(MIXTRAL, num_layers=1, ffn_size=10**11), "huge", tmp_path, lambda text: None)


def test_rows_follow_the_load_and_no_token_takes_an_expert_twice() -> None:
    generator = np.random.default_rng(0)
    drawn = np.array([draw_rows([100, 50, 50, 0], 16, 2, generator) for _ in range(200)])
    assert drawn.shape == (200, 4)
    assert set(drawn.sum(1)) == {32}
    assert drawn.max() <= 16
    assert not drawn[:, 3].any()
    assert drawn[:, 0].mean() > drawn[:, 1].mean()
    assert draw_rows([1, 1], 5, 2, generator) == [5, 5]


def test_the_kernel_alone_is_timed(tiny: Path) -> None:
    kernel = KernelSpeed(str(tiny), "fp16", torch.get_num_threads())
    assert kernel.facts["kernel"] == "fp16"
    assert kernel.facts["layers_held"] == 3
    answer = kernel.handle({"load": [[1] * 8] * 3, "batch": 4, "top_k": 2, "seed": 0})
    assert answer["step_s"] > 0
    assert answer["cpu_s"] > 0
    assert answer["steps"] >= 4


def test_the_kernel_runs_in_a_process_of_its_own(tiny: Path) -> None:
    process = start_kernel_speed(tiny, "fp32", 1)
    try:
        assert process.facts == {"facts": {"kernel": "fp32", "threads": 1, "layers_held": 3}}
        assert process.ask({"load": [[1] * 8] * 3, "batch": 2, "top_k": 2, "seed": 0})["step_s"] > 0
        with pytest.raises(BenchError, match="the kernel's own speed: "):
            process.ask({"load": [[1] * 8] * 3})
    finally:
        process.close()
