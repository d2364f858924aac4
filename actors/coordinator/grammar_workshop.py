"""Compiles grammars for one vocabulary: first in a process that may be killed, then, once that went well, here.

Blocking, and used from one thread: the owner (`actors.coordinator.grammars`) keeps a thread for it. The process is
started when it is first needed and kept; one that a grammar has ended is replaced.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from actors.coordinator.grammar_trial import read_frame, write_frame
from model.grammar.compiled import Compiled
from model.grammar.spec import GrammarError, GrammarSpec
from model.grammar.vocabulary import Vocabulary

CPU_S = 2
MEMORY_BYTES = 512 << 20
PATIENCE_S = 30.0
"""In real time, for a machine that is busy: then the request may be tried again, it is not the grammar's fault."""
_ROOT = Path(__file__).resolve().parents[2]


class WorkshopBusy(Exception):
    """No time was left to compile; later there may be."""


class Workshop:
    """A grammar may take `cpu_s` seconds of a processor's time and `memory_bytes` to compile."""

    def __init__(self, vocabulary: Vocabulary, *, cpu_s: int = CPU_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self._vocabulary = vocabulary
        self._cpu_s = cpu_s
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self.killed_total = 0

    def compile(self, spec: GrammarSpec) -> Compiled:
        """The grammar, ready for use here. Raises GrammarError, which says what is wrong with it, or WorkshopBusy."""
        text = self._try(spec)
        return Compiled(self._vocabulary, text)

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def _try(self, spec: GrammarSpec) -> str:
        """What the process makes of it. Raises GrammarError or WorkshopBusy."""
        process = self._process or self._start()
        job = {"kind": spec.kind.value, "text": spec.text, "cpu_s": self._cpu_s}
        answer = self._exchange(process, json.dumps(job).encode())
        if answer is None:
            raise GrammarError(self._obituary(process))
        found = json.loads(answer)
        if "error" in found:
            raise GrammarError(found["error"])
        return str(found["text"])

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(_ROOT), *filter(None, sys.path)])
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "actors.coordinator.grammar_trial", str(self._memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert process.stdin is not None
        facts, blob = self._vocabulary.parts()
        try:
            write_frame(process.stdin, json.dumps(facts).encode())
        except OSError:
            self.close()
            raise WorkshopBusy("the process that tries grammars could not be started") from None
        if self._exchange(process, blob) is None:
            self.close()
            raise WorkshopBusy("the process that tries grammars could not be started")
        return process

    def _exchange(self, process: subprocess.Popen[bytes], data: bytes) -> bytes | None:
        """Its answer; None where it has died of the question. Raises WorkshopBusy where it takes too long."""
        assert process.stdin is not None
        assert process.stdout is not None
        until_s = time.monotonic() + PATIENCE_S
        try:
            write_frame(process.stdin, data)
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, until_s - time.monotonic()))
            if ready:
                return read_frame(process.stdout)
        except OSError:
            return None
        self._count_death()
        raise WorkshopBusy(f"no grammar could be compiled within {PATIENCE_S:g} s")

    def _obituary(self, process: subprocess.Popen[bytes]) -> str:
        """Why the process died, as the grammar's fault."""
        try:
            code = process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            code = 0
        self._count_death()
        if code == -signal.SIGXCPU:
            return f"it takes more than {self._cpu_s} s to compile"
        if code == -signal.SIGKILL:
            raise WorkshopBusy("the process that tries grammars was killed")
        return f"it needs more than {self._memory_bytes >> 20} MiB to compile, or is nested too deeply"

    def _count_death(self) -> None:
        self.killed_total += 1
        self.close()
