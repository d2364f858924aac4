"""Virtual environments for other people's clients, one each, outside the tree: `python -m tests.clients.environments`.

The clients' dependencies contradict each other and ours, so none is ever installed beside the server. An environment is
named by the hash of its exact pins: a changed pin makes a new one, an unchanged one is made once. What a client is
asked to do is `tests.clients.scripts`' work.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from actors.command.cache_dir import user_cache_dir

REQUIREMENTS = Path(__file__).with_name("requirements")
INSTALL_TIMEOUT_S = 1800.0

BORROWERS = frozenset({"guidellm", "lm_eval"})
"""These import torch or transformers: too large to have twice, so they see this project's packages after their own."""


@dataclass(frozen=True, slots=True)
class ClientEnvironment:
    """One client's virtual environment; `name` is that of its file of requirements."""

    name: str

    @property
    def requirements(self) -> Path:
        """Exact pins of the client and of everything that it needs."""
        return REQUIREMENTS / f"{self.name}.txt"

    @property
    def path(self) -> Path:
        """Where it is, or would be."""
        lines = self.requirements.read_text().splitlines()
        pins = [f"python {sys.version_info[0]}.{sys.version_info[1]}", *(one for one in lines if one[:1] != "#")]
        pins += ["borrows"] if self.name in BORROWERS else []
        digest = hashlib.sha256("\n".join(pins).encode()).hexdigest()
        return _root() / f"{self.name}-{digest[:12]}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin/python"

    @property
    def is_made(self) -> bool:
        """True once everything is installed in it."""
        return self._stamp.exists()

    @property
    def _stamp(self) -> Path:
        return self.path / ".made"

    def make(self) -> None:
        """Makes it where it is lacking; what an interrupted try left is thrown away. Raises CalledProcessError."""
        if self.is_made:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        venv.create(self.path, with_pip=False, symlinks=True)
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--no-deps", "--quiet"]
        subprocess.run(
            [*command, "--disable-pip-version-check", "-r", str(self.requirements)],
            check=True,
            timeout=INSTALL_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
        if self.name in BORROWERS:
            paths = {"base": str(self.path), "platbase": str(self.path)}
            site = Path(sysconfig.get_path("purelib", vars=paths))
            (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self._stamp.touch()


def all_environments() -> list[ClientEnvironment]:
    """One for every file of requirements."""
    return [ClientEnvironment(path.stem) for path in sorted(REQUIREMENTS.glob("*.txt"))]


def _root() -> Path:
    """`OCTAVO_CLIENTS_DIR`, or a folder of the user's cache: not where a test puts its own cache."""
    given = os.environ.get("OCTAVO_CLIENTS_DIR")
    return Path(given) if given else user_cache_dir() / "clients"


def make_all(names: list[str]) -> None:
    """Makes the environments of that name, or all; says which it makes. One process at a time."""
    wanted = [one for one in all_environments() if not names or one.name in names]
    _root().mkdir(parents=True, exist_ok=True)
    with (_root() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for one in wanted:
            if not one.is_made:
                print(f"making {one.path} ...", flush=True)
                one.make()


if __name__ == "__main__":
    make_all(sys.argv[1:])
