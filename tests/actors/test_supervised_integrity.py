"""What a supervisor makes of damage: a start that is refused by name, a replica that is replaced, a fingerprint."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import actors
import actors.supervision.supervisor as supervisor_module
from actors import code_version as code_version_module
from actors.code_version import code_version, source_digest
from actors.ray_runtime import RuntimeFailure
from actors.supervision import status_report
from actors.supervision.in_process import InProcessRuntime
from actors.supervision.status import ClusterStatus
from model.storage.checkpoint import Checkpoint
from model.storage.integrity import verified
from model.storage.manifest import MANIFEST_NAME
from model.storage.safetensors_header import CheckpointError
from tests.actors.test_supervisor import config_of, ready, supervised, until
from tests.support.checkpoints import write_mixtral
from tests.support.front import run
from tests.support.tokenizers import write_byte_tokenizer


@pytest.fixture(autouse=True)
def _quick_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "ROUND_S", 0.02)
    monkeypatch.setattr(supervisor_module, "STARTING_ROUND_S", 0.02)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A model to be damaged, with its manifest."""
    path = tmp_path / "own"
    write_mixtral(path, layers=2, experts=2, dtype=torch.float16)
    write_byte_tokenizer(path)
    verified(Checkpoint.open(path), tmp_path)
    return path


def flip(path: Path, name: str) -> None:
    stored, first, count = Checkpoint.open(path).stored(name)
    with stored.path.open("r+b") as file:
        at = stored.start + first + count // 3
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


async def started(path: Path, **changes: Any) -> ClusterStatus:
    async with supervised(config_of(path, **changes), InProcessRuntime()) as one:
        return await until(one, ready)


@pytest.mark.parametrize(
    ("tensor", "who"), [("layers.1.experts.1.w2", "expert-1-r0"), ("layers.0.wk", "coordinator-0")]
)
def test_a_damaged_tensor_refuses_the_start_and_is_named(own: Path, tensor: str, who: str) -> None:
    flip(own, tensor)
    stored, _, _ = Checkpoint.open(own).stored(tensor)

    async def work() -> None:
        runtime = InProcessRuntime()
        async with supervised(config_of(own), runtime) as one:
            status = await until(one, lambda status: "failed" in {row.state for row in _rows(status)})
            (failed,) = [row for row in _rows(status) if row.state == "failed"]
            assert getattr(failed, "replica_id", None) == who or getattr(failed, "coordinator_id", None) == who
            for said in (str(own / "model.safetensors"), repr(stored.name), f"({tensor})", "CRC-32C", "manifest says"):
                assert said in failed.detail
            assert "\n" not in failed.detail
            with pytest.raises(RuntimeFailure, match=f"{who} cannot start: CheckpointError: "):
                await one.endpoints()

    run(work())


def _rows(status: ClusterStatus) -> list[Any]:
    return [*status.replicas, *status.coordinators]


def test_a_manifest_of_another_checkpoint_refuses_the_start(own: Path) -> None:
    (own / MANIFEST_NAME).write_text('{"version": 1, "algorithm": "crc32c", "tensors": {}, "files": {}}')

    async def work() -> None:
        with pytest.raises(CheckpointError, match=r"does not describe tensor .* remove this manifest"):
            async with supervised(config_of(own), InProcessRuntime()):
                pass

    run(work())


def test_the_first_start_makes_the_manifest(own: Path) -> None:
    (own / MANIFEST_NAME).unlink()

    async def work() -> None:
        await started(own)

    run(work())
    assert (own / MANIFEST_NAME).is_file()


def test_a_condemned_replica_leaves_the_map_and_is_replaced(own: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        async with supervised(config_of(own, replicas=2), runtime) as one:
            first = await until(one, ready)
            victim = runtime.find("expert/expert-1-r1/1", "space")
            assert victim is not None
            victim.target.actor._replica.fail("quarantined: canary of expert 1, layer 0: for a test")
            dropped = await until(one, lambda status: status.map_epoch > first.map_epoch)
            assert any("1 replicas" in event or "3 replicas" in event for event in dropped.events)
            after = await until(one, ready)
            assert any("expert-1-r1 again (incarnation 2): quarantined: canary" in event for event in after.events)
            assert after.system_fingerprint == first.system_fingerprint

    run(work())


def test_the_fingerprint_is_of_weights_code_and_kernels(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fingerprint(path: Path, **changes: Any) -> str:
        return (await started(path, **changes)).system_fingerprint

    async def work() -> None:
        first = await fingerprint(own)
        assert first.startswith("fp_")
        elsewhere = tmp_path / "elsewhere"
        shutil.copytree(own, elsewhere)
        assert await fingerprint(elsewhere, coordinators=2, replicas=2) == first  # more of the same
        seen = {first, await fingerprint(own, kernel="fp32")}
        flip(elsewhere, "layers.1.experts.0.w3")
        (elsewhere / MANIFEST_NAME).unlink()
        seen.add(await fingerprint(elsewhere))
        monkeypatch.setattr(status_report, "code_version", lambda: "another")
        seen.add(await fingerprint(own))
        assert len(seen) == 4

    run(work())


def test_the_code_version_changes_with_any_line(tmp_path: Path) -> None:
    assert code_version().startswith(f"{actors.__version__}+")
    root = Path(code_version_module.__file__).parent.parent
    assert code_version() == f"{actors.__version__}+{source_digest(root)[:12]}"
    for room in ("model", "protos", "cluster", "actors"):
        shutil.copytree(root / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    assert source_digest(tmp_path) == source_digest(root)
    with (tmp_path / "model" / "experts.py").open("a") as file:
        file.write("# a line\n")
    assert source_digest(tmp_path) != source_digest(root)
