"""A real cluster for end-to-end tests: `octavo serve` in a process of its own, as a person would type it."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openai
import psutil

from actors import ray_runtime
from actors.supervision.client import SupervisorClient, find_supervisor
from actors.supervision.status import ClusterStatus

NAMESPACE = "octavo"
WITH_PARENT = Path(__file__).with_name("with_parent.py")
START_TIMEOUT_S = 400.0
STOP_TIMEOUT_S = 240.0
COMMAND_TIMEOUT_S = 240.0


class ServedCluster:
    """`octavo serve MODEL` on a free port. `home` keeps its cache and its record apart from the user's."""

    def __init__(self, home: Path, model: Path, *options: str) -> None:
        self.model = model
        self.home = home
        self._joined = options[options.index("--address") + 1] if "--address" in options else None
        self.port = free_port()
        self.env = environment(home)
        self._clients: list[openai.OpenAI] = []
        self.log = home / f"serve-{self.port}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(WITH_PARENT), *octavo(), "serve", str(model), "--port", str(self.port), *options],
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_until_ready()

    @property
    def url(self) -> str:
        """Base URL without a path."""
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> openai.OpenAI:
        """The official client, without retries that would hide an error; closed when the cluster stops."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)
        self._clients.append(client)
        return client

    def status(self) -> ClusterStatus:
        """What `octavo status` shows, asked over a connection that is kept: a command takes seconds each time."""
        return self.supervisor().status()

    def supervisor(self) -> SupervisorClient:
        """Found by Ray's head; once it has answered, it is asked without."""
        record = self.home / "cache/octavo/running.json"
        address = self._joined or str(json.loads(record.read_text())["ray_address"])
        if ray_runtime.is_connected() and ray_runtime.address() != address:
            ray_runtime.disconnect()
        if not ray_runtime.is_connected():
            ray_runtime.connect(address, NAMESPACE)
        supervisor = find_supervisor(NAMESPACE)
        assert supervisor is not None, "the cluster has no supervisor"
        return supervisor

    def coordinators(self) -> list[dict[str, Any]]:
        """What each coordinator says of itself now; `status`, which must have been asked before, is a round old."""
        names = [name for name in ray_runtime.names(NAMESPACE) if name.startswith("coordinator/")]
        found = [ray_runtime.find(name, NAMESPACE) for name in names]
        return [dict(one.call_sync("info", timeout_s=60.0)) for one in found if one is not None]

    def processes(self) -> list[psutil.Process]:
        """The serving process and everything it started, Ray's own included."""
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Asks it to stop as Ctrl-C does; returns its exit status."""
        ray_runtime.disconnect()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        finally:
            while self._clients:
                self._clients.pop().close()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "ready in" not in self.log.read_text(errors="replace"):
            text = self.log.read_text(errors="replace")
            assert self.process.poll() is None, f"serve exited with {self.process.returncode}:\n{text}"
            if time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"not ready after {START_TIMEOUT_S:g} s:\n{text}")
            time.sleep(0.2)


def octavo() -> Sequence[str]:
    """The command, through this interpreter."""
    return [sys.executable, "-m", "actors.cli"]


def run(arguments: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs `octavo ARGUMENTS` to its end."""
    return subprocess.run(
        [*octavo(), *arguments], env=env, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )


def environment(home: Path) -> dict[str, str]:
    """The caller's environment with a cache of its own, and Ray's switches said out loud."""
    return os.environ | {
        "XDG_CACHE_HOME": str(home / "cache"),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


def command_line(process: psutil.Process) -> str:
    """What a process was started with, or calls itself; nothing if it has ended since it was found."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def free_port() -> int:
    """A port that nobody listens on now, nor is given meanwhile: below those that the system chooses from.

    A cluster starts dozens of processes, each with ports of the system's choice, before it binds the one it was told.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
            return int(probe.getsockname()[1])
