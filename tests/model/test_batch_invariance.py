"""The promise on exact numbers: logits do not depend on company, chunking, preemption or the order of steps.

Everything here is compared bit for bit.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kernels import KERNELS
from model.numerics import same_bits
from tests.support.checkpoints import write_dense_llama, write_mixtral
from tests.support.paged import PagedModel, random_ids

KINDS: dict[str, dict[str, Any]] = {
    "fp16": {"dtype": torch.float16},
    "fp32": {},
    "bf16-window": {"dtype": torch.bfloat16, "sliding_window": 50, "experts": 8},
    "odd-fp16": {"dtype": torch.float16, "hidden": 72, "head_dim": 18, "ffn": 107, "kv_heads": 1, "top_k": 1},
    "int8": {"dtype": torch.float16, "kernel": "int8", "experts": 8},
    "odd-int8": {"kernel": "int8", "hidden": 72, "head_dim": 18, "ffn": 107, "kv_heads": 1, "top_k": 1},
    "bf16": {"dtype": torch.bfloat16, "kernel": "bf16"},
    "odd-fp32": {"hidden": 72, "head_dim": 18, "ffn": 107, "kv_heads": 4, "top_k": 3},
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PagedModel:
    path = tmp_path_factory.mktemp(request.param)
    kind = dict(KINDS[request.param])
    kernel = kind.pop("kernel", None)
    if kernel is not None and not KERNELS[kernel].usable(torch.device("cpu")):
        pytest.skip(f"this CPU has no {kernel} arithmetic")
    write_mixtral(path, vocab=200, **kind)
    return PagedModel(path, kernel=kernel, num_blocks=400)


def ids_of(length: int, seed: int) -> list[int]:
    return random_ids(length, vocab=200, seed=seed)


def test_a_prompt_alone_and_among_31_others(model: PagedModel) -> None:
    prompts = {f"s{index}": ids_of(1 + (index * 29) % 190, index) for index in range(32)}
    alone = {name: model.score(ids) for name, ids in prompts.items()}
    together = model.step(prompts)
    for name in prompts:
        assert same_bits(together[name], alone[name]), name
        model.release(name)


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_any_chunk_size_gives_the_same_logits(model: PagedModel, chunk: int) -> None:
    ids = ids_of(160, 40)
    assert same_bits(model.score(ids, chunk=chunk), model.score(ids))


def test_replaying_a_generation_gives_the_log_probs_it_was_made_with(model: PagedModel) -> None:
    """mistral-inference's test: log-probs while generating equal those of scoring the whole text at once."""
    prompts = {f"p{index}": ids_of(5 + 31 * index, 50 + index) for index in range(4)}
    text = {name: list(ids) for name, ids in prompts.items()}
    made: dict[str, list[Tensor]] = {name: [] for name in prompts}
    fresh = dict(prompts)
    for _ in range(20):
        for name, logits in model.step(fresh).items():
            log_probs = torch.log_softmax(logits[-1], dim=-1)
            made[name].append(log_probs)
            text[name].append(int(log_probs.argmax()))
        fresh = {name: ids[-1:] for name, ids in text.items()}
    for name, ids in text.items():
        model.release(name)
        replayed = torch.log_softmax(model.score(ids[:-1]), dim=-1)
        for at, log_probs in enumerate(made[name]):
            assert same_bits(replayed[len(prompts[name]) - 1 + at], log_probs), (name, at)


def test_decoding_beside_prefills_and_other_decodes(model: PagedModel) -> None:
    """One sequence is decoded while others come, are prefilled in pieces, decode and go."""
    ids = ids_of(60, 60)
    expected = model.score(ids)
    got = [model.step({"kept": ids[:20]})["kept"]]
    for at in range(20, 60):
        name = f"other{at // 4}"
        company = {name: ids_of(1 + 13 * (at % 4), at)}
        got.append(model.step({**company, "kept": ids[at : at + 1]})["kept"])
        if at % 4 == 3:
            model.release(name)
    model.release("kept")
    assert same_bits(torch.cat(got), expected)


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


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_schedule_gives_the_same_logits(schedule_model: PagedModel, data: st.DataObject) -> None:
    texts = {f"s{index}": ids_of(length, 80 + index) for index, length in enumerate((75, 33, 128, 4))}
    plan = draw_schedule(data, {name: len(ids) for name, ids in texts.items()})
    got: dict[str, list[Tensor]] = {name: [] for name in texts}
    for step in plan:
        new = {name: texts[name][start:stop] for name, (start, stop) in step.items()}
        for name, logits in schedule_model.step(new).items():
            got[name].append(logits)
    for name, ids in texts.items():
        schedule_model.release(name)
        assert same_bits(torch.cat(got[name]), schedule_model.score(ids)), name


def draw_schedule(data: st.DataObject, lengths: dict[str, int]) -> list[dict[str, tuple[int, int]]]:
    """Steps until every sequence is read; each takes the next 1 to 50 tokens of some sequences, in any order."""
    done = dict.fromkeys(lengths, 0)
    steps = []
    while ready := [name for name, length in lengths.items() if done[name] < length]:
        step = {}
        for name in data.draw(st.lists(st.sampled_from(ready), min_size=1, unique=True)):
            stop = min(lengths[name], done[name] + data.draw(st.integers(1, 50)))
            step[name] = (done[name], stop)
            done[name] = stop
        steps.append(step)
    return steps


@pytest.fixture(scope="module")
def schedule_model(tmp_path_factory: pytest.TempPathFactory) -> PagedModel:
    path = tmp_path_factory.mktemp("schedules")
    write_mixtral(path, vocab=200, layers=1, dtype=torch.float16, sliding_window=70)
    return PagedModel(path)


def test_a_dense_model_keeps_the_promise_too(tmp_path: Path) -> None:
    write_dense_llama(tmp_path, vocab=200, dtype=torch.float16)
    model = PagedModel(tmp_path)
    ids = ids_of(70, 90)
    whole = model.score(ids)
    assert same_bits(model.score(ids, chunk=9), whole)
    assert same_bits(model.step({"a": ids_of(30, 91), "b": ids})["b"], whole)


THREADS_PROGRAM = """
import sys
import torch
from pathlib import Path
torch.set_num_threads(int(sys.argv[2]))
from model.kernels import KERNELS
from model.numerics import same_bits
from tests.support.paged import PagedModel, random_ids
model = PagedModel(Path(sys.argv[1]))
ids = random_ids(150, seed=5)
whole = model.score(ids)
assert same_bits(model.score(ids, chunk=33), whole)
assert same_bits(model.score(ids, chunk=1), whole)
assert same_bits(model.step({"x": random_ids(40, seed=6), "y": ids})["y"], whole)
torch.save(whole, sys.argv[3])
"""


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_promise_holds_for_every_thread_count(tmp_path: Path, dtype: torch.dtype) -> None:
    write_mixtral(tmp_path, dtype=dtype)
    logits = []
    for threads in ("1", "2"):
        saved = tmp_path / f"{threads}.pt"
        program = [sys.executable, "-c", THREADS_PROGRAM, str(tmp_path), threads, str(saved)]
        subprocess.run(program, check=True, timeout=200)
        logits.append(torch.load(saved))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
