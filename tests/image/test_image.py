"""The image that k8s/Dockerfile makes, in containers as the demo overlay's pods describe them.

`make image-check` runs these; see `tests.support.image` for what is other than with a registry.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import actors
from tests.support.pod_machines import USER, Image, make_manifest, one_pod, say

pytestmark = [pytest.mark.timeout(1500)]


def test_it_is_octavo_of_this_version_for_a_user_who_is_not_root(cpu_image: Image, tmp_path: Path) -> None:
    _, config = cpu_image
    assert config["User"] == f"{USER}:{USER}"
    assert config["Cmd"] == ["octavo", "--help"]
    with one_pod("experts", cpu_image, tmp_path) as pod:
        shown = say(pod, "octavo --version; id -u; id -g; touch /opt/octavo/x; touch /tmp/x && echo written")
        assert shown.stdout.split() == ["octavo", actors.__version__, str(USER), str(USER), "written"], shown
        assert "Read-only file system" in shown.stderr
        status = say(pod, "cat /proc/self/status").stdout
        assert re.findall(r"^(?:CapEff|CapBnd|CapPrm):\s(\w+)$", status, re.MULTILINE) == ["0" * 16] * 3
        assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
        assert re.search(r"^Seccomp:\t2$", status, re.MULTILINE), "a filter"


def test_it_is_small_and_has_nothing_to_build_with(cpu_image: Image) -> None:
    """Of torch and Ray it has what runs: neither headers, nor their tests, nor Java."""
    root, _ = cpu_image
    for tool in ("gcc", "cc", "make", "git", "curl", "buildah"):
        assert not list(root.glob(f"usr/*bin/{tool}")), tool
    packages = root / "opt/octavo/lib/python3.11/site-packages"
    for gone in ("torch/include", "torch/test", "ray/jars"):
        assert not (packages / gone).exists(), gone
    for name in ("pytest", "ruff", "mypy"):
        assert not (packages / name).exists(), "only what serving needs"
    size = sum(path.lstat().st_size for path in (root / "opt/octavo").rglob("*"))
    print(f"/opt/octavo: {size / 1e6:.0f} MB")
    assert size < 1.4e9


def test_weights_are_held_to_their_manifest_before_a_pod_starts(cpu_image: Image, tmp_path: Path) -> None:
    """The init container of the manifest: without a manifest it fails, with one it passes."""
    with one_pod("experts", cpu_image, tmp_path) as pod:
        make_manifest(pod)
        pod.init()
        (weights,) = (tmp_path / "claim").rglob("model.safetensors")
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        (verify,) = pod.spec["initContainers"]
        damaged = pod.run_once(verify)
        assert damaged.returncode == 1
        assert "is damaged, or was replaced" in damaged.stderr


def test_a_pod_that_may_get_http_is_not_ready_with_experts_only(cpu_image: Image, tmp_path: Path) -> None:
    """KubeRay's own label; without the policy of ready-experts it stays."""
    with one_pod("experts", cpu_image, tmp_path) as pod:
        pod.start("exec sleep infinity", {"GETS_HTTP": "true"})
        until(lambda: pod.exec(["true"]).returncode == 0)
        assert not pod.passes("readinessProbe")


def until(holds: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
