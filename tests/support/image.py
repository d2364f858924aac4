"""Builds the image from k8s/Dockerfile without a registry: the base is made of Debian's packages, wheels lie ready.

Every instruction of the Dockerfile is carried out as it is; only its two build arguments are others. What was fetched
is kept in build/image between runs. Running it is `tests.support.pods`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.manifests import K8S, ROOT

TOOLS = ("buildah", "runc", "mmdebstrap")
BASE = "octavo-check-base"
# What python:3.11-slim-bookworm has of this; Debian's own Python is 3.11, too.
_PACKAGES = "python3.11-venv,python-is-python3,ca-certificates"
_OFFLINE = "[global]\nno-index = true\nfind-links = /wheels\n"


def why_not() -> str | None:
    """Why no image can be built here, or None."""
    if os.geteuid() != 0:
        return "building and running containers needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)} (Debian packages of these names)" if missing else None


class Workshop:
    """Where images are built. `directory` is kept; its store of images goes with `close`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._store = directory / "store"
        directory.mkdir(parents=True, exist_ok=True)

    def build(self, target: str) -> None:
        """Builds that target of the Dockerfile as `octavo:TARGET`."""
        self._make_base()
        wheels = self._wheels()
        offline = self._directory / "pip.conf"
        offline.write_text(_OFFLINE)
        self._buildah(
            *("bud", "--isolation", "chroot", "--layers=false", "--pull-never"),
            *("--file", str(K8S / "Dockerfile"), "--ignorefile", str(K8S / "Dockerfile.dockerignore")),
            *("--target", target, "--tag", f"octavo:{target}"),
            *("--build-arg", f"PYTHON=localhost/{BASE}", "--build-arg", "CPU_INDEX=file:///wheels"),
            *("--volume", f"{wheels}:/wheels:ro", "--volume", f"{offline}:/etc/pip.conf:ro"),
            str(ROOT),
        )

    def has(self, target: str) -> bool:
        """Whether that target was built, and not closed."""
        return self._store.exists() and bool(
            self._buildah("images", "--quiet", "--filter", f"reference=octavo:{target}")
        )

    def mounted(self, target: str) -> Path:
        """The root file system of `octavo:TARGET`."""
        container = self._buildah("from", "--pull-never", f"localhost/octavo:{target}")
        return Path(self._buildah("mount", container))

    def config(self, target: str) -> dict[str, Any]:
        """What the image says of itself: User, Env, Cmd, WorkingDir."""
        inspected = json.loads(self._buildah("inspect", "--type", "image", f"localhost/octavo:{target}"))
        return dict(inspected["OCIv1"]["config"])

    def close(self) -> None:
        """Images and containers are gone; what was fetched stays."""
        if self._store.exists():
            self._buildah("umount", "--all")
            self._buildah("rm", "--all")
            self._buildah("rmi", "--all", "--force")
            # buildah leaves the directory mounted on itself
            subprocess.run(["umount", str(self._store / "overlay")], capture_output=True, check=False)
            shutil.rmtree(self._store, ignore_errors=True)

    def _make_base(self) -> None:
        archive = self._directory / "base.tar"
        if not archive.exists():
            unfinished = archive.with_suffix(".part.tar")
            _run(["mmdebstrap", "--quiet", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", str(unfinished)])
            unfinished.rename(archive)
        container = self._buildah("from", "scratch")
        self._buildah("add", container, str(archive), "/")
        self._buildah("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", container)
        self._buildah("commit", "--quiet", "--rm", container, BASE)

    def _wheels(self) -> Path:
        """Wheels of all that the image installs; fetched where requirements have changed."""
        wheels, wanted = self._directory / "wheels", (K8S / "requirements.txt").read_text()
        fetched = self._directory / "wheels.txt"
        if not fetched.exists() or fetched.read_text() != wanted:
            shutil.rmtree(wheels, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            _run([*pip, "--dest", str(wheels), "--requirement", str(K8S / "requirements.txt")])
            fetched.write_text(wanted)
        return wheels

    def _buildah(self, *arguments: str) -> str:
        where = ["--root", str(self._store), "--runroot", str(self._store / "run"), "--storage-driver", "overlay"]
        return _run(["buildah", *where, *arguments])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()
