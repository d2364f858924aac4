"""`octavo verify` says yes to what the manifest describes, and names what differs."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import actors.cli
from model.storage.checkpoint import Checkpoint
from model.storage.integrity import verified
from model.storage.manifest import MANIFEST_NAME
from model.storage.safetensors_header import CheckpointError
from tests.support.checkpoints import write_mixtral


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkpoint without a manifest."""
    path = tmp_path / "model"
    write_mixtral(path, dtype=torch.float16)
    return path


@pytest.fixture
def model(bare: Path) -> Path:
    """A checkpoint with its manifest beside it."""
    verified(Checkpoint.open(bare), bare)
    return bare


def octavo(*arguments: str) -> str:
    """What the command says; raises what it fails with."""
    done = CliRunner().invoke(actors.cli.app, ["verify", *arguments])
    if done.exception is not None:
        raise done.exception
    return str(done.stderr)


def damage(model: Path) -> str:
    """One bit of one tensor, of which the stored name is returned."""
    stored, first, count = Checkpoint.open(model).stored("layers.1.experts.1.w2")
    with stored.path.open("r+b") as file:
        file.seek(stored.start + first + count // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    return stored.name


def test_a_whole_checkpoint_is_compared(model: Path) -> None:
    said = octavo(str(model))
    assert f"all bytes of {sum(1 for _ in names(model))} tensors as {model / MANIFEST_NAME} says" in said
    assert verified(Checkpoint.open(model), model).checkpoint.content_id in said


def test_a_flipped_bit_is_found_and_named(model: Path) -> None:
    name = damage(model)
    with pytest.raises(CheckpointError, match=r"layers\.1\.experts\.1\.w2") as caught:
        octavo(str(model))
    assert name in str(caught.value)


def test_quick_looks_at_names_and_sizes_only(model: Path) -> None:
    damage(model)
    assert "names, shapes and sizes" in octavo(str(model), "--quick")
    for file in model.glob("*.safetensors"):
        file.unlink()
    write_mixtral(model.with_name("other"), layers=3, dtype=torch.float16)
    for file in model.with_name("other").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=f"{MANIFEST_NAME}: does not describe tensor"):
        octavo(str(model), "--quick")


def test_without_a_manifest_it_says_how_to_make_one(bare: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no manifest .*octavo verify --make"):
        octavo(str(bare))
    assert "made for the first time" in octavo(str(bare), "--make")
    assert "all bytes of" in octavo(str(bare))


def names(model: Path) -> list[str]:
    checkpoint = Checkpoint.open(model)
    return [name for owner in checkpoint.owners for name in checkpoint.names(owner)]
