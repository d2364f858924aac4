"""The outside of a peer's process: starts it, asks it, ends it. What it runs is `peers.child`'s and its module's."""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from experiments.engine_bench.failures import BenchError

ROOT = Path(__file__).resolve().parents[3]
END_TIMEOUT_S = 10.0
LOG_TAIL = 400
# Ours, made for many processes on few cores; a peer runs as its own defaults have it, with all the cores to itself.
OUR_OWN_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")


class JsonProcess:
    """A child that answers one line of JSON to each. `facts` is its answer to the first."""

    def __init__(
        self, name: str, command: Sequence[str], first: Mapping[str, Any], env: Mapping[str, str] | None = None
    ) -> None:
        """Starts it, `env` added to what it inherits, and waits for its first answer. Raises BenchError."""
        self.name = name
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        # A session of its own: Ctrl-C is for the parent, which then ends the child in its turn.
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(env or {}),
            start_new_session=True,
        )
        try:
            self.facts: Mapping[str, Any] = self.ask(first)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer. Raises BenchError when it reports an error or has ended."""
        assert self._process.stdin is not None, "opened as a pipe"
        assert self._process.stdout is not None, "opened as a pipe"
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise BenchError(f"{self.name} ended unexpectedly: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the child: by the end of its input, else by force."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # it died with our request unread
                    pipe.close()
        self._process.terminate()  # it may be amid a long computation
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - LOG_TAIL))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """What a peer sees: ours and then `env`, with this program's packages in reach of another interpreter."""
    seen = {name: value for name, value in os.environ.items() if name not in OUR_OWN_SETTINGS} | dict(env)
    return seen | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), seen.get("PYTHONPATH")]))}
