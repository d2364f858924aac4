"""What the GPU benchmark makes and counts, on a CPU: weights, batches and the bytes that its floors are made of."""

import subprocess
import sys

import pytest
import torch

from experiments.gpu_bench.decode_speed import BLOCK, CONTEXT, decode_batch, prefill_batch
from experiments.gpu_bench.expert_speed import ExpertSpeed
from experiments.gpu_bench.random_weights import RandomWeights
from model.experts import ExpertColumn


def test_the_bytes_are_mixtral_8x7b_s() -> None:
    weights = RandomWeights.of()
    assert weights.expert_bytes == 2 * 3 * 4096 * 14336
    attention = 2 * 4096 * 4096 + 2 * 1024 * 4096
    layer = attention + 2 * 4096 + 8 * 4096
    assert weights.backbone_bytes == 2 * (32 * layer + 4096 + 32000 * 4096)


def test_a_name_decides_the_numbers() -> None:
    weights = RandomWeights.of(hidden=64, ffn=32, layers=1)
    first = weights.read("layers.0.experts.0.w1")
    assert first.shape == weights.shape("layers.0.experts.0.w1") == (32, 64)
    assert first.dtype is torch.bfloat16
    assert torch.equal(first, weights.read("layers.0.experts.0.w1"))
    assert not torch.equal(first, weights.read("layers.0.experts.0.w3"))
    assert torch.equal(weights.read("norm", torch.float32), torch.ones(64))


def test_a_column_can_be_made_of_them() -> None:
    column = ExpertColumn.load(RandomWeights.of(hidden=64, ffn=32, layers=2), 3, range(2), "fp32", "cpu")
    assert column.forward(1, torch.randn(5, 64)).shape == (5, 64)
    assert column.weight_bytes == 2 * 3 * 64 * 32 * 4


def test_batches_are_those_that_are_named() -> None:
    decode, prefill = decode_batch(3), prefill_batch(128)
    assert (decode.num_tokens, decode.logits_rows) == (3, (0, 1, 2))
    assert [item.context_len for item in decode.sequences] == [CONTEXT] * 3
    blocks = [block for item in decode.sequences for block in item.block_table]
    assert blocks == list(range(3 * CONTEXT // BLOCK))
    assert (prefill.num_tokens, prefill.logits_rows) == (128, (127,))


def test_a_line_says_the_share_of_the_floor() -> None:
    line = ExpertSpeed("bf16", 4, "1.4", 100.0, 150.0, 80.0).to_json()
    assert (line["type"], line["of_floor"], line["rows"]) == ("expert", 0.8, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    found = subprocess.run([sys.executable, "-m", "experiments.gpu_bench"], capture_output=True, text=True, timeout=200)
    assert (found.returncode, found.stderr.strip()) == (1, "octavo: no CUDA device is here")
