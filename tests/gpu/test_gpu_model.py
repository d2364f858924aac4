"""On a real GPU, a whole tiny Mixtral: a token depends on its own sequence alone, and agrees with others' tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import PagedAttention
from model.attention_plan import Masks
from model.numerics import same_bits
from tests.support.checkpoints import write_mixtral
from tests.support.gpu import CUDA, needs_gpu, needs_kernel
from tests.support.paged import PagedModel, random_ids

pytestmark = [pytest.mark.gpu, needs_gpu]

WIDE: dict[str, Any] = {"hidden": 512, "heads": 4, "kv_heads": 2, "head_dim": 128, "ffn": 1024, "experts": 8}
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": torch.bfloat16},
    "bf16-wide": {"dtype": torch.bfloat16, **WIDE},
    "bf16-window": {"dtype": torch.bfloat16, "sliding_window": 50, "experts": 8},
    "bf16-odd": {"dtype": torch.bfloat16, "hidden": 72, "head_dim": 18, "ffn": 107, "kv_heads": 1, "top_k": 1},
    "fp8": {"dtype": torch.bfloat16, "kernel": "fp8", **WIDE},
    "fp32": {"kernel": "fp32"},
    "fp32-odd": {"kernel": "fp32", "hidden": 72, "head_dim": 18, "ffn": 107, "kv_heads": 4, "top_k": 3},
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PagedModel:
    path = tmp_path_factory.mktemp(request.param)
    kind = dict(KINDS[request.param])
    kernel = kind.pop("kernel", "bf16")
    needs_kernel(kernel)
    write_mixtral(path, vocab=200, max_context=2048, **kind)
    return PagedModel(path, kernel=kernel, num_blocks=400, device="cuda")


def ids_of(length: int, seed: int) -> list[int]:
    return random_ids(length, vocab=200, seed=seed)


def test_a_prompt_alone_and_among_31_others(model: PagedModel) -> None:
    prompts = {f"s{index}": ids_of(1 + (index * 29) % 190, index) for index in range(32)}
    alone = {name: model.score(ids) for name, ids in prompts.items()}
    together = model.step(prompts)
    for name in prompts:
        assert same_bits(together[name], alone[name]), name
        model.release(name)


@pytest.mark.parametrize("chunk", [1, 7, 33, 400])
def test_any_chunk_size_gives_the_same_logits(model: PagedModel, chunk: int) -> None:
    ids = ids_of(700, 40)
    assert same_bits(model.score(ids, chunk=chunk), model.score(ids))


def test_replaying_a_generation_gives_the_log_probs_it_was_made_with(model: PagedModel) -> None:
    prompts = {f"p{index}": ids_of(5 + 61 * index, 50 + index) for index in range(9)}
    text = {name: list(ids) for name, ids in prompts.items()}
    made: dict[str, list[Tensor]] = {name: [] for name in prompts}
    fresh = dict(prompts)
    for _ in range(12):
        for name, logits in model.step(fresh).items():
            made[name].append(logits[-1])
            text[name].append(int(logits[-1].argmax()))
        fresh = {name: ids[-1:] for name, ids in text.items()}
    for name, ids in text.items():
        model.release(name)
        replayed = model.score(ids[:-1])
        for at, logits in enumerate(made[name]):
            assert same_bits(replayed[len(prompts[name]) - 1 + at], logits), (name, at)


def test_preemption_by_recompute_changes_nothing(model: PagedModel) -> None:
    ids = ids_of(90, 70)
    expected = model.score(ids)
    model.step({"victim": ids[:70]})
    model.release("victim")
    model.step({"thief": ids_of(100, 71)})
    again = model.step({"victim": ids[:50], "another": ids_of(9, 72)})["victim"]
    rest = model.step({"victim": ids[50:]})["victim"]
    assert same_bits(torch.cat([again, rest]), expected)
    for name in ("victim", "another", "thief"):
        model.release(name)


@pytest.mark.parametrize("shape", [{}, WIDE])
def test_fp32_on_the_gpu_is_fp32_on_the_cpu(tmp_path: Path, shape: dict[str, Any]) -> None:
    oracle = write_mixtral(tmp_path, vocab=200, **shape)
    there = PagedModel(tmp_path, kernel="fp32", device="cuda", kv_dtype=torch.float32)
    here = PagedModel(tmp_path, kernel="fp32")
    ids = ids_of(150, 5)
    found = there.score(ids, chunk=40).cpu()
    expected = here.score(ids)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    with torch.no_grad():
        others = oracle.to(CUDA)(torch.tensor([ids], device=CUDA)).logits[0].float().cpu()
    assert float((found - others).norm() / others.norm()) < 1e-3
    assert there.greedy(ids, 24) == here.greedy(ids, 24)


@pytest.mark.parametrize(("kernel", "agreement"), [("bf16", 0.9), ("fp8", 0.6)])
def test_rounding_kernels_mostly_choose_the_tokens_of_fp32(tmp_path: Path, kernel: str, agreement: float) -> None:
    needs_kernel(kernel)
    write_mixtral(tmp_path, vocab=200, dtype=torch.bfloat16, **WIDE)
    ids = ids_of(400, 6)
    exact = PagedModel(tmp_path, kernel="fp32").score(ids)
    rounded = PagedModel(tmp_path, kernel=kernel, device="cuda").score(ids).cpu()
    same = float((exact.argmax(-1) == rounded.argmax(-1)).float().mean())
    error = float((exact - rounded).norm() / exact.norm())
    print(f"{kernel}: the likeliest token is fp32's in {same:.1%} of places, logits differ by {error:.1e}")
    assert same >= agreement


def test_masks_are_those_of_the_table(model: PagedModel) -> None:
    shape = PagedAttention(model.config, CUDA).shape
    there, here = Masks(shape, CUDA), Masks(shape, "cpu")
    heads = shape.heads_per_kv
    for firsts, tokens, keys in (([0], 1, 32), ([5, 5], 1, 64), ([0, 77, 300], 4, 512), ([511], 1, 1024)):
        count = 1 if tokens == 1 else tokens * heads
        made = there.rows(firsts, count, keys)
        assert made.is_contiguous()
        assert torch.equal(made.cpu(), here.rows(firsts, count, keys).expand(made.shape))
