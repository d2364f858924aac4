"""What the writer leaves on disk: complete checkpoints that other libraries open, or nothing that opens."""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from model.storage.checkpoint import Checkpoint
from model.storage.checkpoint_writer import ShardedWriter
from model.storage.manifest import MANIFEST_NAME
from model.storage.safetensors_header import CheckpointError
from model.storage.weight_files import find_weights, index_name, open_weights
from tests.support.checkpoints import write_mixtral
from tests.support.crashing_writer import TENSORS
from tests.support.crashing_writer import write as write_three_shards

ROOT = Path(__file__).parents[2]
PT = {"format": "pt"}


def load_all(model_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every shard, by the safetensors library."""
    return {
        name: tensor
        for shard in sorted(model_dir.glob("model-*.safetensors"))
        for name, tensor in load_file(shard).items()
    }


def test_a_model_written_again_is_the_same_to_transformers_and_to_us(tmp_path: Path) -> None:
    source, dest = tmp_path / "source", tmp_path / "dest"
    model = write_mixtral(source, dtype=torch.bfloat16)
    reported: list[tuple[str, int]] = []
    tensors = load_file(source / "model.safetensors")
    with ShardedWriter(
        dest,
        max_shard_bytes=60_000,
        metadata=PT,
        on_tensor=lambda name, nbytes: reported.append((name, nbytes)),
    ) as writer:
        shutil.copy(source / "config.json", dest)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    assert reported == [(name, tensor.nbytes) for name, tensor in tensors.items()]
    again = transformers.AutoModelForCausalLM.from_pretrained(dest, dtype=torch.float32)
    for (name, ours), theirs in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    ours, theirs = Checkpoint.open(dest), Checkpoint.open(source)
    for owner in theirs.owners:
        for name in theirs.names(owner):
            assert torch.equal(ours.read(name), theirs.read(name))


def test_shards_and_index_are_named_as_hugging_face_names_them(tmp_path: Path) -> None:
    write_three_shards(tmp_path)
    shards = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path)) == [*shards, index_name(), MANIFEST_NAME]
    index = json.loads((tmp_path / index_name()).read_text())
    assert index["metadata"] == {"total_size": 5 * 48}
    assert index["weight_map"] == {f"tensor.{i}": shards[i // 2] for i in range(5)}
    with safe_open(tmp_path / shards[0], "pt") as shard:
        assert shard.metadata() == PT
        assert list(shard.keys()) == ["tensor.0", "tensor.1"]


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 200),
)
def test_any_tensors_in_any_order_come_back(
    tmp_path: Path, parts: list[tuple[torch.dtype, list[int]]], max_shard_bytes: int
) -> None:
    tensors = {f"t{i}": torch.randn(shape).to(dtype) for i, (dtype, shape) in enumerate(parts)}
    dest = tmp_path / "any"
    shutil.rmtree(dest, ignore_errors=True)
    with ShardedWriter(dest, max_shard_bytes=max_shard_bytes, metadata=PT) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    loaded = load_all(dest)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    for header in open_weights(dest).headers:
        held = sum(tensor.nbytes for tensor in header.tensors.values())
        assert held <= max_shard_bytes or len([t for t in header.tensors.values() if t.nbytes]) == 1


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    with ShardedWriter(tmp_path, max_shard_bytes=1 << 20, metadata=PT) as writer:
        writer.add("transposed", base.T)
        writer.add("columns", base[:, 1:3])
        writer.add("parameter", torch.nn.Parameter(base))
    loaded = load_all(tmp_path)
    assert torch.equal(loaded["transposed"], base.T)
    assert torch.equal(loaded["columns"], base[:, 1:3])
    assert torch.equal(loaded["parameter"], base)


def test_a_header_that_is_full_begins_another_shard(tmp_path: Path) -> None:
    names = [f"{i:04d}." + "x" * 1000 for i in range(300)]
    with ShardedWriter(tmp_path, max_shard_bytes=1 << 30, metadata=PT) as writer:
        for name in names:
            writer.add(name, torch.ones(2))
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 3
    assert load_all(tmp_path).keys() == set(names)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a", torch.ones(2), "'a' is written twice"),
        ("b", torch.ones(2, dtype=torch.int64), "'b': dtype torch.int64 cannot be written"),
        ("x" * 200_000, torch.ones(2), "name or metadata are too long for a header"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    def attempt() -> None:
        with ShardedWriter(tmp_path, max_shard_bytes=8, metadata=PT) as writer:
            writer.add("a", torch.ones(2))
            writer.add(name, tensor)

    with pytest.raises(CheckpointError, match=message):
        attempt()
    assert os.listdir(tmp_path) == []


def test_a_callers_error_leaves_its_files_and_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    def attempt() -> None:
        with ShardedWriter(tmp_path, max_shard_bytes=8, metadata=PT) as writer:
            writer.add("a", torch.ones(2))
            writer.add("b", torch.ones(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt()
    assert os.listdir(tmp_path) == ["config.json"]


def test_an_empty_checkpoint_is_none(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="no tensor was written"),
        ShardedWriter(tmp_path, max_shard_bytes=8, metadata=PT),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_a_shard_must_hold_something(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1, got 0"):
        ShardedWriter(tmp_path, max_shard_bytes=0, metadata=PT)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", index_name(), "consolidated.safetensors", "model-00001-of-00002.safetensors"],
)
def test_a_place_that_is_taken(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("somebody's")
    with pytest.raises(CheckpointError, match=f"{name}: already exists"):
        write_three_shards(tmp_path)
    assert (tmp_path / name).read_text() == "somebody's"
    assert os.listdir(tmp_path) == [name]


def test_two_writers_in_one_place(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another process is writing a checkpoint there"):
        write_three_shards(tmp_path)
    os.close(fd)
    write_three_shards(tmp_path)
    assert load_all(tmp_path).keys() == TENSORS.keys()


def test_a_place_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: cannot be written: File exists"):
        write_three_shards(tmp_path / "file")


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: `write` fails in the same place, with another reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:

        def attempt() -> None:
            with ShardedWriter(tmp_path, max_shard_bytes=1 << 24, metadata=PT) as writer:
                writer.add("a", torch.ones(1 << 20))

        with pytest.raises(CheckpointError, match="cannot be written: File too large"):
            attempt()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_a_crash_at_any_moment_leaves_nothing_that_opens(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.crashing_writer", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    num_runs = int(run.stdout)
    assert num_runs > 20
    published = 0
    for step in range(num_runs):
        dest = tmp_path / str(step)
        if dest.is_dir() and find_weights(dest) is not None:  # it died after the index was in its place
            published += 1
            assert load_all(dest).keys() == open_weights(dest).tensors.keys() == TENSORS.keys()
            with pytest.raises(CheckpointError, match="already exists"):
                write_three_shards(dest)
        else:
            write_three_shards(dest)  # which clears away what the crashed writer left
        for name, tensor in load_all(dest).items():
            assert torch.equal(tensor, TENSORS[name])
        assert len(list(dest.glob("*"))) == 5
        assert list(dest.glob(".*")) == []
    assert 1 <= published <= 5
