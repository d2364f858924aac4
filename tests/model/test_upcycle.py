"""An upcycled model says what the dense one said, is a Mixtral to everybody, and appears whole or not at all."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import MixtralForCausalLM, PreTrainedModel

from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.storage.checkpoint import COORDINATOR, Checkpoint, Expert
from model.storage.config_reader import read_config
from model.text.chat_template import ChatTemplate
from model.text.tokenizer import TokenizerError, load_tokenizer
from model.transformer import load_local, run_local
from model.upcycling.upcycle import UpcycleError, upcycle
from model.upcycling.upcycle_report import UpcycleReport
from tests.support.checkpoints import write_dense_llama, write_dense_mistral, write_mixtral
from tests.support.gguf_files import write_gguf
from tests.support.tokenizers import write_byte_tokenizer

PROMPT = [1, 90, 50, 17, 200, 42, 42, 131, 7]
SMALL: dict[str, Any] = {"num_windows": 16, "window_tokens": 64}


@pytest.fixture
def dense_dir(tmp_path: Path) -> Path:
    write_byte_tokenizer(tmp_path / "dense")
    return tmp_path / "dense"


def greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """The next `count` tokens by transformers, end tokens or not."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def greedy_ours(checkpoint: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The next `count` tokens by our own model, from its KV cache."""
    backbone, experts = load_local(checkpoint)
    num_blocks = (len(prompt) + count) // 32 + 1
    kv = KVCache(checkpoint.config, num_blocks=num_blocks, block_size=32, dtype=torch.float32, device="cpu")
    ids, start = list(prompt), 0
    for _ in range(count):
        batch = ForwardBatch.build([ids[start:]], starts=[start], block_tables=[range(num_blocks)])
        start = len(ids)
        ids.append(int(run_local(backbone, batch, kv, experts)[0].argmax()))
    return ids[len(prompt) :]


def mixtral(path: Path) -> Any:
    """The checkpoint as transformers reads it, in fp32."""
    model: Any = MixtralForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def small_upcycle(source: Path, dest: Path, **options: Any) -> UpcycleReport:
    return upcycle(source, dest, **({"num_experts": 4} | SMALL | options))


@pytest.mark.parametrize(
    ("num_experts", "top_k", "dtype"),
    [(8, 2, torch.float32), (4, 1, torch.float32), (5, 3, torch.float16), (4, 2, torch.bfloat16)],
)
def test_the_greedy_text_is_the_dense_models(
    tmp_path: Path, dense_dir: Path, num_experts: int, top_k: int, dtype: torch.dtype
) -> None:
    dense = write_dense_llama(dense_dir, dtype=dtype)
    upcycle(dense_dir, tmp_path / "moe", num_experts=num_experts, top_k=top_k, **SMALL)
    moe = mixtral(tmp_path / "moe")
    assert (moe.config.num_local_experts, moe.config.num_experts_per_tok) == (num_experts, top_k)
    with torch.no_grad():
        logits = [model(torch.tensor([PROMPT])).logits for model in (dense, moe)]
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    expected = greedy(dense, PROMPT, 40)
    assert len(set(expected)) > 5
    assert greedy(moe, PROMPT, 40) == expected
    assert greedy_ours(Checkpoint.open(tmp_path / "moe"), PROMPT, 40) == expected


def test_a_mistral_with_a_window_and_tied_embeddings(tmp_path: Path, dense_dir: Path) -> None:
    dense = write_dense_mistral(dense_dir, sliding_window=16, tied=True)
    small_upcycle(dense_dir, tmp_path / "moe")
    config = read_config(tmp_path / "moe")
    assert (config.sliding_window, config.tied_embeddings) == (16, True)
    moe = mixtral(tmp_path / "moe")
    assert moe.config.sliding_window == 16
    assert greedy(moe, PROMPT, 30) == greedy(dense, PROMPT, 30)
    assert greedy_ours(Checkpoint.open(tmp_path / "moe"), PROMPT, 30) == greedy(dense, PROMPT, 30)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_scaling_survives(tmp_path: Path, dense_dir: Path, rope: dict[str, Any]) -> None:
    dense = write_dense_llama(dense_dir, rope_parameters={"rope_theta": 5000.0} | rope)
    small_upcycle(dense_dir, tmp_path / "moe")
    before, after = read_config(dense_dir), read_config(tmp_path / "moe")
    assert (after.rope_theta, after.rope_scaling) == (5000.0, before.rope_scaling)
    moe = mixtral(tmp_path / "moe")
    assert greedy(moe, PROMPT, 20) == greedy(dense, PROMPT, 20)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0])
def test_a_gguf_is_upcycled_with_its_tokenizer(tmp_path: Path, dense_dir: Path, kind: GGMLQuantizationType) -> None:
    model = write_dense_llama(dense_dir, ffn=128)
    path = write_gguf(tmp_path / "dense.gguf", model, dense_dir, kind=kind)
    report = small_upcycle(path, tmp_path / "moe")
    assert report.dtype == (torch.float32 if kind == GGMLQuantizationType.F32 else torch.float16)
    moe = mixtral(tmp_path / "moe")
    if kind == GGMLQuantizationType.F32:
        assert greedy(moe, PROMPT, 30) == greedy(model, PROMPT, 30)
    assert greedy_ours(Checkpoint.open(tmp_path / "moe"), PROMPT, 30) == greedy(moe, PROMPT, 30)
    tokenizer, original = load_tokenizer(tmp_path / "moe"), load_tokenizer(dense_dir)
    messages = [{"role": "user", "content": "Grüße 123"}]
    chats = [
        ChatTemplate.load(path, tokenizer).encode(messages, tokenizer)
        for path, tokenizer in ((tmp_path / "moe", tokenizer), (dense_dir, original))
    ]
    assert chats[0] == chats[1]


def test_experts_are_equal_and_routers_are_not(tmp_path: Path, dense_dir: Path) -> None:
    write_dense_llama(dense_dir, layers=3, dtype=torch.float16)
    report = small_upcycle(dense_dir, tmp_path / "moe")
    moe, dense = Checkpoint.open(tmp_path / "moe"), Checkpoint.open(dense_dir)
    assert moe.dtype == torch.float16
    for layer in range(3):
        for part in ("w1", "w2", "w3"):
            original = dense.read(f"layers.{layer}.experts.0.{part}")
            for expert in range(4):
                assert torch.equal(moe.read(f"layers.{layer}.experts.{expert}.{part}"), original)
        assert torch.equal(moe.read(f"layers.{layer}.wq"), dense.read(f"layers.{layer}.wq"))
        gate_ED = moe.read(f"layers.{layer}.gate")
        assert len({tuple(row) for row in gate_ED.tolist()}) == 4
    owned = sum(moe.owned_bytes(Expert(expert)) for expert in range(4))
    assert report.weight_bytes == owned + moe.owned_bytes(COORDINATOR)


def test_the_report_describes_every_layers_router(tmp_path: Path, dense_dir: Path) -> None:
    write_dense_llama(dense_dir, layers=3)
    told: list[tuple[str, int, int]] = []
    report = small_upcycle(dense_dir, tmp_path / "moe", progress=lambda *step: told.append(step))
    assert report.calibration_tokens == 16 * 64
    assert len(report.routers) == 3
    for router in report.routers:
        assert 0 <= router.min_load <= 1 <= router.max_load <= 4 / 2
        assert 0.5 <= router.top_weight[0] <= router.top_weight[1] <= router.top_weight[2] <= 1
        assert 0 <= router.same_next <= 1
    notes = json.loads((tmp_path / "moe" / "upcycle.json").read_text())
    assert notes["source"] == "dense"
    assert [router["max_load"] for router in notes["routers"]] == [r.max_load for r in report.routers]
    text = "\n".join(report.lines())
    assert "4 experts, top-2, float32" in text
    assert "over 3 layers" in text
    assert [step for step in told if step[0] == "routers"] == [("routers", n, 3) for n in range(4)]
    assert told[-1] == ("weights", report.weight_bytes, report.weight_bytes)
    assert [what for what, _, _ in told] == sorted(what for what, _, _ in told)


def test_the_seed_decides_the_routers(tmp_path: Path, dense_dir: Path) -> None:
    write_dense_llama(dense_dir)
    gates = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        small_upcycle(dense_dir, tmp_path / name, seed=seed)
        gates.append(Checkpoint.open(tmp_path / name).read("layers.1.gate"))
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 1}, "num_experts must be at least 2, got 1"),
        ({"top_k": 0}, r"top_k must be from 1 to num_experts \(4\), got 0"),
        ({"top_k": 5}, r"top_k must be from 1 to num_experts \(4\), got 5"),
        ({"window_tokens": 1024}, "window_tokens must be from 2 to 512, got 1024"),
        ({"num_windows": 8}, "num_windows must be at least 16, got 8"),
    ],
)
def test_wrong_options_are_refused_and_leave_nothing(
    tmp_path: Path, dense_dir: Path, options: dict[str, Any], message: str
) -> None:
    write_dense_llama(dense_dir)
    with pytest.raises(UpcycleError, match=message):
        small_upcycle(dense_dir, tmp_path / "moe", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_mixture_is_refused(tmp_path: Path, dense_dir: Path) -> None:
    write_mixtral(dense_dir)
    with pytest.raises(UpcycleError, match="has 4 experts already"):
        small_upcycle(dense_dir, tmp_path / "moe")


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_dense_llama(tmp_path / "dense")
    with pytest.raises(TokenizerError):
        small_upcycle(tmp_path / "dense", tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_an_existing_destination_is_refused_and_untouched(tmp_path: Path, dense_dir: Path) -> None:
    write_dense_llama(dense_dir)
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "precious").touch()
    with pytest.raises(UpcycleError, match="moe: exists already"):
        small_upcycle(dense_dir, tmp_path / "moe")
    assert [path.name for path in (tmp_path / "moe").iterdir()] == ["precious"]


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path: Path, dense_dir: Path) -> None:
    model = write_dense_llama(dense_dir, ffn=128)
    huge = model.model.layers[1].mlp.up_proj.weight.detach().numpy().copy()
    huge[3, 3] = 1e6
    path = write_gguf(tmp_path / "huge.gguf", model, dense_dir, tensors={"blk.1.ffn_up.weight": huge})
    with pytest.raises(UpcycleError, match=r"float16 cannot hold the values of layers\.1\.experts\.0\.w3"):
        small_upcycle(path, tmp_path / "moe", dtype=torch.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "huge.gguf"]
    small_upcycle(path, tmp_path / "moe", dtype=torch.bfloat16)
    stored = Checkpoint.open(tmp_path / "moe").read("layers.1.experts.2.w3", torch.float32)
    assert np.isclose(float(stored[3, 3]), 1e6, rtol=1e-2)


def test_what_a_killed_run_left_is_overwritten(tmp_path: Path, dense_dir: Path) -> None:
    write_dense_llama(dense_dir)
    child = (
        "import os, sys; from pathlib import Path; from model.upcycling.upcycle import upcycle\n"
        "kill = lambda what, done, total: os.kill(os.getpid(), 9) if what == 'weights' and done else None\n"
        "upcycle(Path(sys.argv[1]), Path(sys.argv[2]), num_windows=16, window_tokens=64, progress=kill)\n"
    )
    command = [sys.executable, "-c", child, str(dense_dir), str(tmp_path / "moe")]
    root = Path(__file__).parents[2]
    assert subprocess.run(command, cwd=root, env=os.environ, check=False, timeout=120).returncode == -9
    assert not (tmp_path / "moe").exists()
    assert (tmp_path / ".moe.partial").is_dir()
    small_upcycle(dense_dir, tmp_path / "moe")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]
    Checkpoint.open(tmp_path / "moe")


def test_two_runs_do_not_write_one_place(tmp_path: Path, dense_dir: Path) -> None:
    write_dense_llama(dense_dir)

    def second(what: str, done: int, total: int) -> None:
        if (what, done) == ("routers", 1):
            with pytest.raises(ValueError, match="another process is writing"):
                small_upcycle(dense_dir, tmp_path / "moe")

    small_upcycle(dense_dir, tmp_path / "moe", progress=second)
    assert isinstance(MixtralForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32), MixtralForCausalLM)
