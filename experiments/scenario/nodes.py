"""More Ray nodes on this machine, so that copies of an expert have somewhere to go in a live scenario.

Each is a raylet of its own, begun by Ray's command line as on any other machine, and ended with the block.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from actors import ray_runtime
from actors.ray_runtime import RuntimeFailure

OBJECT_STORE_BYTES = 128 * 1024 * 1024
START_S = 240.0
MAX_STARTS = 3
"""Ray gives a node's processes 30 s to begin, whatever else the machine has to do."""
END_S = 20.0
POLL_S = 0.2
NUM_DEVICES = 64
"""Of a node whose experts have a device each."""

Begin = Callable[[IO[bytes]], subprocess.Popen[bytes]]
"""Starts a process that says what it has to say into that file."""


@contextmanager
def more_nodes(num: int, num_cpus: int) -> Iterator[None]:
    """`num` nodes of so many processors beside those of the Ray that this process has joined.

    Raises RuntimeFailure when they do not come.
    """
    wanted = len(ray_runtime.nodes()) + num
    address = ray_runtime.address()
    with ExitStack() as logs:
        files = [logs.enter_context(tempfile.TemporaryFile()) for _ in range(num)]
        started = [NodeProcess(lambda log: _start(address, num_cpus, log), file) for file in files]
        try:
            _wait(started, wanted)
            yield
        finally:
            _end(started)
            ray_runtime.forget(address)


class NodeProcess:
    """One node's process, started again where it ended by itself."""

    def __init__(self, begin: Begin, log: IO[bytes]) -> None:
        self._begin, self._log = begin, log
        self._starts = 1
        self.process = begin(log)

    def look(self) -> None:
        """Starts it again if it has ended. Raises RuntimeFailure, with its last words, the last time."""
        if self.process.poll() is None:
            return
        if self._starts == MAX_STARTS:
            self._log.seek(0)
            said = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
            raise RuntimeFailure(
                f"a Ray node on this machine did not start: ray start ended with {self.process.returncode} "
                f"{MAX_STARTS} times, at last with {(said or ['nothing'])[-1]!r}"
            )
        self._starts += 1
        self.process = self._begin(self._log)


def _start(address: str, num_cpus: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("ray")), "start", "--address", address, "--block"]
    size = ["--num-cpus", str(num_cpus), "--object-store-memory", str(OBJECT_STORE_BYTES)]
    env = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", **os.environ}
    return subprocess.Popen([*command, *size], env=env, stdout=log, stderr=subprocess.STDOUT)


def _wait(started: Sequence[NodeProcess], wanted: int) -> None:
    deadline_s = time.monotonic() + START_S
    while len(ray_runtime.nodes()) < wanted:
        for one in started:
            one.look()
        if time.monotonic() > deadline_s:
            raise RuntimeFailure(f"{wanted} Ray nodes on this machine were not there after {START_S:g} s")
        time.sleep(POLL_S)


def _end(started: Sequence[NodeProcess]) -> None:
    """`ray start --block` ends its node's processes when it is told to end."""
    for one in started:
        one.process.terminate()
    deadline_s = time.monotonic() + END_S
    for one in started:
        try:
            one.process.wait(max(deadline_s - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
