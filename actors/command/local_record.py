"""The one local cluster of this user: a lock that keeps a second start out, and where to find the first one."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

from actors.ray_runtime import RuntimeFailure


class LocalRecord:
    """`running.json` in a user's cache directory, locked for as long as the cluster runs.

    The lock is the kernel's and goes with the process, so a killed cluster never blocks the next start.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "running.json"

    @contextmanager
    def hold(self, url: str) -> Iterator["HeldRecord"]:
        """Holds the place for a cluster at `url`. Raises RuntimeFailure when another process has it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                other = self.read()
                where = f"{other.get('url', 'an unknown address')} (pid {other.get('pid', '?')})"
                raise RuntimeFailure(f"octavo already serves at {where}; stop it first") from None
            held = HeldRecord(file, url)
            held.write(ray_address="")
            try:
                yield held
            finally:
                file.truncate(0)

    def read(self) -> Mapping[str, str]:
        """What the running cluster wrote: url, pid, ray_address; empty when there is none, or it was killed."""
        try:
            value = json.loads(self._path.read_text() or "{}")
            alive = psutil.pid_exists(int(value["pid"])) if value else False
        except (OSError, ValueError, TypeError, LookupError):
            return {}
        return value if alive else {}


class HeldRecord:
    """The place while it is held."""

    def __init__(self, file: IO[str], url: str) -> None:
        self._file = file
        self._url = url

    def write(self, *, ray_address: str) -> None:
        """Records where this process's cluster is."""
        self._file.truncate(0)
        json.dump({"url": self._url, "pid": str(os.getpid()), "ray_address": ray_address}, self._file)
        self._file.flush()
