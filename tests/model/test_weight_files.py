"""Which files are a checkpoint, and every way in which files and index can disagree."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model.storage.safetensors_header import CheckpointError
from model.storage.weight_files import find_weights, index_name, open_weights, shard_name

ONE, TWO = shard_name(1, 2), shard_name(2, 2)


def save(path: Path, *names: str) -> None:
    save_file({name: torch.full((2,), float(len(name))) for name in names}, path)


def save_index(model_dir: Path, weight_map: object) -> None:
    (model_dir / index_name()).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save(tmp_path / ONE, "a", "bb")
    save(tmp_path / TWO, "ccc")
    save_index(tmp_path, {"a": ONE, "bb": ONE, "ccc": TWO})
    return tmp_path


def test_names_are_those_of_hugging_face() -> None:
    assert shard_name(3, 12) == "model-00003-of-00012.safetensors"
    assert index_name() == "model.safetensors.index.json"


def test_shards_with_an_index(sharded: Path) -> None:
    files = open_weights(sharded)
    assert [header.path.name for header in files.headers] == [ONE, TWO]
    assert {name: tensor.path.name for name, tensor in files.tensors.items()} == {
        "a": ONE,
        "bb": ONE,
        "ccc": TWO,
    }


@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.safetensors"])
def test_a_single_file(tmp_path: Path, name: str) -> None:
    assert find_weights(tmp_path) is None
    save(tmp_path / name, "a")
    assert find_weights(tmp_path) == tmp_path / name
    assert open_weights(tmp_path).tensors.keys() == {"a"}


def test_hugging_face_files_win_over_consolidated_ones(sharded: Path) -> None:
    save(sharded / "consolidated.safetensors", "other")
    assert find_weights(sharded) == sharded / index_name()
    assert "other" not in open_weights(sharded).tensors


def test_no_weights_at_all(tmp_path: Path) -> None:
    save(tmp_path / ONE, "a")  # shards alone are an unfinished download
    with pytest.raises(CheckpointError, match=r"no safetensors weights .looked for model.safetensors, model"):
        open_weights(tmp_path)


def test_index_and_single_file_together(sharded: Path) -> None:
    save(sharded / "model.safetensors", "a")
    with pytest.raises(CheckpointError, match=r"holds both model[.a-z]*index.json and"):
        open_weights(sharded)


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / TWO).unlink()
    with pytest.raises(CheckpointError, match=f"{TWO}: missing shard, which should hold tensor 'ccc'"):
        open_weights(sharded)


def test_a_shard_that_is_not_listed(sharded: Path) -> None:
    save(sharded / shard_name(1, 3), "d")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003\.safetensors: a shard that .* does not list"):
        open_weights(sharded)


def test_a_tensor_in_the_wrong_shard(sharded: Path) -> None:
    save_index(sharded, {"a": ONE, "bb": TWO, "ccc": TWO})
    with pytest.raises(CheckpointError, match=f"{ONE}: tensor 'bb': model.* says it is in {TWO}"):
        open_weights(sharded)


def test_a_tensor_that_the_index_does_not_list(sharded: Path) -> None:
    save_index(sharded, {"a": ONE, "ccc": TWO})
    with pytest.raises(CheckpointError, match=f"{ONE}: tensor 'bb': model.* says it is nowhere"):
        open_weights(sharded)


def test_a_tensor_that_only_the_index_has(sharded: Path) -> None:
    save_index(sharded, {"a": ONE, "bb": ONE, "ccc": TWO, "dddd": TWO})
    with pytest.raises(CheckpointError, match=f"{TWO}: tensor 'dddd' is missing, model.* lists it"):
        open_weights(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    save(sharded / TWO, "ccc", "a")
    with pytest.raises(CheckpointError, match=f"{TWO}: tensor 'a' is also in {ONE}"):
        open_weights(sharded)


def test_a_truncated_shard(sharded: Path) -> None:
    content = (sharded / TWO).read_bytes()
    (sharded / TWO).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"{TWO}: tensor 'ccc': truncated"):
        open_weights(sharded)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/a.safetensors",
        "model.bin",
        "",
        7,
        None,
        "\n.safetensors",
    ],
)
def test_an_index_may_not_point_elsewhere(sharded: Path, shard: object) -> None:
    save_index(sharded, {"a": shard})
    with pytest.raises(CheckpointError, match=r"'a': .* is not the name of a safetensors file"):
        open_weights(sharded)


def test_a_name_too_long_for_any_file(sharded: Path) -> None:
    save_index(sharded, {"a": "x" * 300 + ".safetensors"})
    with pytest.raises(CheckpointError, match="is not the name of a safetensors file"):
        open_weights(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [], "a"])
def test_an_index_without_a_map(sharded: Path, weight_map: object) -> None:
    save_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match="'weight_map' must be a non-empty object"):
        open_weights(sharded)


@settings(
    max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: json.dumps({"weight_map": {"a": text}}).encode()))
def test_no_index_raises_anything_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / index_name()).write_bytes(content)
    with pytest.raises(CheckpointError):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "consolidated.00.pt", "pytorch_model.bin", "model.gguf"])
def test_weights_of_another_format_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"holds no safetensors weights .*; {name} must be converted"):
        open_weights(tmp_path)
