"""What a coordinator loads: the whole of its share, the ids that end a generation, and a cache that fits."""

import json
from pathlib import Path

import psutil
import pytest
import torch

from actors.coordinator.loading import (
    LoadProgress,
    eos_token_ids,
    gpu_room,
    load_model,
    make_kv_cache,
    num_threads,
    vocabulary_of,
)
from cluster.budget import BudgetError
from cluster.config import ClusterConfig
from model.storage.checkpoint import COORDINATOR, Checkpoint
from tests.support.checkpoints import write_mixtral
from tests.support.tokenizers import write_byte_tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest: Path = tmp_path_factory.mktemp("coordinator_model")
    write_mixtral(dest, layers=1, experts=2)
    return dest


def test_loading_reports_every_byte_that_the_coordinator_owns(path: Path) -> None:
    progress = LoadProgress()
    loaded = load_model(ClusterConfig(model=str(path), coordinator_threads=1, max_num_seqs=3), progress)
    checkpoint = Checkpoint.open(path)
    assert progress.loaded_bytes == progress.total_bytes == checkpoint.owned_bytes(COORDINATOR)
    assert progress.load_s > 0
    assert loaded.kernel == "fp32"
    assert loaded.weights_id == checkpoint.weights_id
    assert loaded.scheduler_config.max_model_len == 512
    assert loaded.scheduler_config.max_num_seqs == 3


def test_the_cache_is_no_larger_than_all_sequences_can_use(path: Path) -> None:
    model = Checkpoint.open(path).config
    config = ClusterConfig(model=str(path), max_num_seqs=3, max_model_len=70)
    assert make_kv_cache(config, model, torch.device("cpu")).num_blocks == 3 * 3


def test_the_cache_is_no_larger_than_was_asked_for(path: Path) -> None:
    model = Checkpoint.open(path).config
    cache = make_kv_cache(ClusterConfig(model=str(path), kv_cache_bytes=100_000), model, torch.device("cpu"))
    assert cache.nbytes <= 100_000 < cache.nbytes + cache.nbytes // cache.num_blocks


def test_a_cache_larger_than_the_memory_is_refused(path: Path) -> None:
    model = Checkpoint.open(path).config
    config = ClusterConfig(model=str(path), kv_cache_bytes=2 * psutil.virtual_memory().total)
    with pytest.raises(BudgetError, match=r"kv_cache_bytes is .* but only .* are free"):
        make_kv_cache(config, model, torch.device("cpu"))


def test_ids_that_end_a_generation_come_from_all_who_know_one(path: Path, tmp_path: Path) -> None:
    model = Checkpoint.open(path).config
    assert eos_token_ids(model, tmp_path) == {2}, "no tokenizer there"
    assert vocabulary_of(tmp_path, model, frozenset({2})) is None
    write_byte_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert eos_token_ids(model, tmp_path) == {2, 7}
    vocabulary = vocabulary_of(tmp_path, model, frozenset({2, 7}))
    assert vocabulary is not None
    assert (vocabulary.size, vocabulary.eos_ids) == (model.vocab_size, (2, 7))
    assert vocabulary_of(tmp_path, model, frozenset()) is None, "nothing ends a text"


def test_threads_are_those_of_the_configuration_or_of_the_machine(path: Path) -> None:
    assert num_threads(ClusterConfig(model=str(path), coordinator_threads=3)) == 3
    assert num_threads(ClusterConfig(model=str(path))) >= 1


@pytest.mark.parametrize(
    ("free", "held", "share", "room"),
    [(70, 5, None, 70), (70, 5, 1.0, 70), (70, 5, 0.25, 15), (10, 5, 0.25, 10), (70, 30, 0.25, 0)],
)
def test_of_a_shared_gpu_a_coordinator_takes_its_own_part(free: int, held: int, share: float | None, room: int) -> None:
    """Experts that are to load there have not taken theirs yet."""
    assert gpu_room(free, 80, held, share) == room
