"""A checkpoint is held to its manifest: every flipped bit is refused by name, in every layout."""

import json
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.experts import ExpertColumn
from model.storage import manifest as manifest_file
from model.storage.checkpoint import COORDINATOR, Checkpoint, Expert
from model.storage.checkpoint_writer import ShardedWriter
from model.storage.integrity import Verified, make_manifest, manifest_places, verified
from model.storage.manifest import MANIFEST_NAME, Manifest
from model.storage.safetensors_header import CheckpointError
from model.transformer import Backbone
from tests.support.checkpoints import write_mistral_consolidated, write_mixtral

EXPERTS = 4


def plain(dest: Path) -> None:
    write_mixtral(dest, dtype=torch.float16)


def sharded(dest: Path) -> None:
    write_mixtral(dest, max_shard_size="100KB")


def fused(dest: Path) -> None:
    write_mixtral(dest, fused=True, dtype=torch.bfloat16)


def consolidated(dest: Path) -> None:
    write_mistral_consolidated(dest, write_mixtral(dest.with_name("source")), dtype=torch.bfloat16)


LAYOUTS: list[Callable[[Path], None]] = [plain, sharded, fused, consolidated]


def hold(path: Path) -> Verified:
    return verified(Checkpoint.open(path), path.parent / "own")


def read_all(checkpoint: Checkpoint) -> None:
    """As a coordinator and one actor per expert would: in other dtypes than stored, too."""
    for owner in checkpoint.owners:
        for name in checkpoint.names(owner):
            checkpoint.read(name, torch.float32)
            checkpoint.read(name)


def flip(checkpoint: Checkpoint, name: str, draw: random.Random) -> None:
    """One bit of one tensor, on disk."""
    stored, first, count = checkpoint.stored(name)
    flip_at(stored.path, stored.start + first + draw.randrange(count), draw.randrange(8))


def flip_at(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize("write", LAYOUTS)
def test_a_flipped_bit_in_any_tensor_is_refused_by_name(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "model")
    made = hold(tmp_path / "model")
    assert made.made
    assert made.manifest == tmp_path / "model" / MANIFEST_NAME
    found = hold(tmp_path / "model")
    assert not found.made
    read_all(found.checkpoint)
    draw = random.Random(7)
    for owner in found.checkpoint.owners:
        for name in found.checkpoint.names(owner):
            state = draw.getstate()
            flip(found.checkpoint, name, draw)
            stored, _, _ = found.checkpoint.stored(name)
            expected = found.checkpoint.checksums[name]
            for dtype in (None, torch.float32):
                with pytest.raises(CheckpointError) as caught:
                    found.checkpoint.read(name, dtype)
                for said in (str(stored.path), repr(stored.name), f"({name})", f"the manifest says {expected:08x}"):
                    assert said in str(caught.value)
            draw.setstate(state)
            flip(found.checkpoint, name, draw)
    read_all(found.checkpoint)


def test_who_loads_a_damaged_tensor_fails_and_the_others_do_not(tmp_path: Path) -> None:
    plain(tmp_path / "model")
    checkpoint = hold(tmp_path / "model").checkpoint
    flip(checkpoint, "layers.1.experts.2.w3", random.Random(1))
    load = ExpertColumn.load
    for expert in (0, 1, 3):
        load(checkpoint, expert, range(2), "fp32", "cpu")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .*experts\.2\.w3.*damaged"):
        load(checkpoint, 2, range(2), "fp32", "cpu")
    Backbone.load(checkpoint, "fp32", "cpu")
    flip(checkpoint, "layers.0.gate", random.Random(1))
    with pytest.raises(CheckpointError, match=r"\(layers\.0\.gate\) is damaged"):
        Backbone.load(checkpoint, "fp32", "cpu")


def test_a_checkpoint_that_we_write_comes_with_the_manifest_that_would_be_made_of_it(tmp_path: Path) -> None:
    plain(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / "config.json").write_bytes((tmp_path / "source" / "config.json").read_bytes())
    with ShardedWriter(dest, max_shard_bytes=100_000, metadata={"format": "pt"}) as writer:
        for owner in source.owners:
            for name in source.names(owner):
                writer.add(source.stored(name)[0].name, source.read(name))
    assert Manifest.read(dest / MANIFEST_NAME) == make_manifest(Checkpoint.open(dest))
    written = hold(dest)
    assert not written.made
    assert written.checkpoint.content_id == hold(tmp_path / "source").checkpoint.content_id  # other files, same weights


def test_where_nothing_can_be_written_the_manifest_is_kept_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain(tmp_path / "model")
    write = Manifest.write

    def refused(self: Manifest, path: Path) -> None:
        if path.parent == tmp_path / "model":
            raise PermissionError(13, "Permission denied")
        write(self, path)

    monkeypatch.setattr(Manifest, "write", refused)  # file modes do not bind root
    made = hold(tmp_path / "model")
    assert made.manifest == manifest_places(made.checkpoint, tmp_path / "own")[1]
    assert not (tmp_path / "model" / MANIFEST_NAME).exists()
    found = hold(tmp_path / "model")
    assert (found.manifest, found.made) == (made.manifest, False)
    assert found.checkpoint.checksums == made.checkpoint.checksums
    flip(found.checkpoint, "embed", random.Random(2))
    with pytest.raises(CheckpointError, match=r"\(embed\) is damaged"):
        hold(tmp_path / "model").checkpoint.read("embed")


def test_two_models_of_one_name_do_not_share_a_manifest(tmp_path: Path) -> None:
    checkpoints = []
    for parent in ("a", "b"):
        plain(tmp_path / parent / "model")
        checkpoints.append(Checkpoint.open(tmp_path / parent / "model"))
    first, second = (manifest_places(checkpoint, tmp_path)[1] for checkpoint in checkpoints)
    assert first != second


def test_without_any_place_the_weights_are_held_to_what_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_self: Manifest, _path: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Manifest, "write", refused)
    plain(tmp_path / "model")
    made = hold(tmp_path / "model")
    assert made.manifest is None
    flip(made.checkpoint, "norm", random.Random(2))
    with pytest.raises(CheckpointError, match=r"\(norm\) is damaged"):
        made.checkpoint.read("norm")


def test_many_at_once_make_one_whole_manifest(tmp_path: Path) -> None:
    sharded(tmp_path / "model")
    results: list[Verified] = []
    threads = [threading.Thread(target=lambda: results.append(hold(tmp_path / "model"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert len({one.checkpoint.content_id for one in results}) == 1
    left = sorted(path.name for path in (tmp_path / "model").iterdir() if "manifest" in path.name)
    assert left == [MANIFEST_NAME]


def test_a_write_that_breaks_off_leaves_the_old_manifest_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain(tmp_path / "model")
    made = hold(tmp_path / "model")
    assert made.manifest is not None
    before = made.manifest.read_bytes()

    def broken(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest_file.os, "fsync", broken)
    with pytest.raises(OSError, match="No space"):
        make_manifest(made.checkpoint).write(made.manifest)
    assert made.manifest.read_bytes() == before
    assert not [path for path in made.manifest.parent.iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.update(version=2), "version 2 of 'crc32c', this side knows 1"),
        (lambda content: content.update(algorithm="md5"), "version 1 of 'md5'"),
        (lambda content: content.pop("tensors"), "not a manifest"),
        (lambda content: content.update(tensors=[]), "not a manifest"),
        (lambda content: content["tensors"]["model.norm.weight"].pop("checksums"), "not a manifest"),
        (lambda content: content["tensors"]["model.norm.weight"].update(checksums=["zz"]), "not a manifest"),
        (lambda content: content["tensors"]["model.norm.weight"].update(checksums=[]), "not a manifest"),
        (lambda content: content["tensors"]["model.norm.weight"].update(shape=[63]), "tensor 'model.norm.weight' of"),
        (lambda content: content["tensors"]["model.norm.weight"].update(dtype="float32"), "does not describe"),
        (lambda content: content["tensors"]["model.norm.weight"].update(bytes=1), "does not describe"),
        (lambda content: content["tensors"]["model.norm.weight"].update(file="x"), "remove this manifest"),
        (lambda content: content["tensors"]["model.norm.weight"]["checksums"].append("00000000"), "does not describe"),
        (lambda content: content["tensors"].pop("model.norm.weight"), "does not describe"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    change: Callable[[dict[str, object]], object], said: str, tmp_path: Path
) -> None:
    plain(tmp_path / "model")
    path = hold(tmp_path / "model").manifest
    assert path is not None
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"octavo-manifest\.json") as caught:
        hold(tmp_path / "model")
    assert said in str(caught.value)


def test_bytes_that_are_no_manifest_are_refused(tmp_path: Path) -> None:
    plain(tmp_path / "model")
    for content in (b"", b"{", b"[]", b"\xff\xfe"):
        (tmp_path / "model" / MANIFEST_NAME).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"octavo-manifest\.json"):
            hold(tmp_path / "model")


def test_a_files_time_is_only_a_hint(tmp_path: Path) -> None:
    plain(tmp_path / "model")
    hold(tmp_path / "model")
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    read_all(hold(tmp_path / "model").checkpoint)


def test_the_content_id_changes_with_any_bit_and_with_the_configuration(tmp_path: Path) -> None:
    plain(tmp_path / "model")
    before = hold(tmp_path / "model").checkpoint
    (tmp_path / "model" / MANIFEST_NAME).unlink()
    again = hold(tmp_path / "model").checkpoint
    assert again.content_id == before.content_id != before.weights_id
    stored, first, _ = before.stored("layers.1.experts.3.w2")
    flip_at(stored.path, stored.start + first, 0)  # far from what `weights_id` looks at
    (tmp_path / "model" / MANIFEST_NAME).unlink()
    flipped = hold(tmp_path / "model").checkpoint
    assert flipped.weights_id == before.weights_id
    assert flipped.content_id != before.content_id
    flip_at(stored.path, stored.start + first, 0)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    (tmp_path / "model" / MANIFEST_NAME).unlink()
    assert hold(tmp_path / "model").checkpoint.content_id != before.content_id


def test_a_process_may_be_given_its_own_checksums_alone(tmp_path: Path) -> None:
    plain(tmp_path / "model")
    whole = hold(tmp_path / "model").checkpoint
    mine = {name: whole.checksums[name] for name in whole.names(Expert(1))}
    checkpoint = Checkpoint.open(tmp_path / "model").expecting(mine)
    flip(checkpoint, "layers.0.experts.1.w1", random.Random(3))
    flip(checkpoint, "embed", random.Random(3))
    with pytest.raises(CheckpointError, match=r"experts\.1\.w1"):
        checkpoint.read("layers.0.experts.1.w1")
    checkpoint.read("embed")
    assert checkpoint.content_id == checkpoint.weights_id
    assert COORDINATOR in checkpoint.owners
