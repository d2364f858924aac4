"""The demo model itself: it cuts text as llama.cpp does, and says what the dense model says, in good English."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.command.demo_model import ensure_demo_model
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.storage.checkpoint import Checkpoint
from model.text.chat_template import ChatTemplate
from model.text.tokenizer import load_tokenizer
from model.transformer import load_local, run_local

pytestmark = [pytest.mark.demo, pytest.mark.timeout(900)]

# Recorded from llama.cpp (llama-cpp-python 0.3.36, vocabulary of the same GGUF file).
LLAMA_CPP_IDS = {
    "Hello world": [19556, 905],
    "I'm 12345 years old, isn't it?": [57, 5248, 216, 33, 34, 35, 36, 37, 929, 1573, 28, 3247, 982, 357, 47],
    "def f(x):\n    return x**2\n\n\n  # end\t\ttab": [
        *(1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 1116, 3805, 907, 1112, 197, 197, 15999),
    ],
    "naïve café — Ünïcödé 漢字 😀 ½ ²": [
        *(3546, 46494, 37366, 1841, 5549, 246, 94, 25972, 83, 7466, 84, 2756, 17097, 137, 112, 36518, 40303),
        *(218, 216, 16738, 216, 19133),
    ],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
    "  leading spaces and trailing   ": [216, 2899, 5600, 284, 35079, 333],
    "\r\n\r\nA1b2C3 ٣٤": [7209, 198, 49, 33, 82, 34, 51, 35, 216, 164, 113, 164, 114],
}


class DenseView:
    """The dense model inside an upcycled one: its first expert alone, no router."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.dtype = checkpoint.dtype

    @property
    def config(self) -> ModelConfig:
        return replace(self._checkpoint.config, num_experts=1, top_k=1)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def read(self, name: str, dtype: torch.dtype | None = None, device: Any = "cpu") -> torch.Tensor:
        return self._checkpoint.read(name, dtype, device)


@pytest.fixture(scope="module")
def demo_dir() -> Path:
    return ensure_demo_model()


def greedy(source: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Up to `count` tokens for each prompt, all prompts in one batch, until the end of the turn."""
    backbone, experts = load_local(source)
    config, blocks = source.config, max(map(len, prompts)) // 32 + count // 32 + 2
    kv = KVCache(config, num_blocks=blocks * len(prompts), block_size=32, dtype=torch.float32, device="cpu")
    tables = [range(blocks * i, blocks * (i + 1)) for i in range(len(prompts))]
    ids, starts = [list(prompt) for prompt in prompts], [0] * len(prompts)
    for _ in range(count):
        new = [known[start:] for known, start in zip(ids, starts, strict=True)]
        starts = list(map(len, ids))
        batch = ForwardBatch.build(new, [len(i) - len(n) for i, n in zip(ids, new, strict=True)], tables)
        for known, token in zip(ids, run_local(backbone, batch, kv, experts).argmax(-1), strict=True):
            known.append(int(token))
    ends = set(config.eos_token_ids)
    replies = [known[len(prompt) :] for known, prompt in zip(ids, prompts, strict=True)]
    return [reply[: next((i for i, t in enumerate(reply) if t in ends), count)] for reply in replies]


def test_the_tokenizer_gives_llama_cpps_ids(demo_dir: Path) -> None:
    tokenizer = load_tokenizer(demo_dir)
    for text, ids in LLAMA_CPP_IDS.items():
        assert tokenizer.encode(text, add_bos=False) == ids
        assert tokenizer.decode(ids, skip_special=False) == text


def test_the_mixture_says_what_the_dense_model_says(demo_dir: Path) -> None:
    checkpoint, tokenizer = Checkpoint.open(demo_dir), load_tokenizer(demo_dir)
    template = ChatTemplate.load(demo_dir, tokenizer)
    questions = ["What is the capital of France?", "Write two sentences about the sea."]
    prompts = [template.encode([{"role": "user", "content": question}], tokenizer) for question in questions]
    mixture = greedy(checkpoint, prompts, 32)
    assert mixture == greedy(DenseView(checkpoint), prompts, 32)
    answers = [tokenizer.decode(reply) for reply in mixture]
    assert answers[0] == "The capital of France is Paris."
    assert answers[1].startswith("The sea is a vast and")


def test_the_demo_is_small_and_its_load_is_skewed_and_local(demo_dir: Path) -> None:
    assert sum(path.stat().st_size for path in demo_dir.iterdir()) < 1.5e9
    routers = json.loads((demo_dir / "upcycle.json").read_text())["routers"]
    assert len(routers) == 30
    assert 1.2 < statistics.median(router["max_load"] for router in routers) < 2.5
    assert min(router["min_load"] for router in routers) > 0.05
    same = statistics.median(router["same_next"] for router in routers)
    assert same > 1.5 * statistics.median(router["same_by_chance"] for router in routers)
    for router in routers:
        assert 0.55 < router["top_weight"][1] < 0.75
        assert router["top_weight"][2] < 0.95
