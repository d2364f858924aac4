"""Campaigns in processes of their own, with a limit on memory: what a decoder does is counted, and the rest goes on.

A process that dies (a native crash) or hangs where Python's alarms do not reach counts as a crash of the input that it
was at, which it had noted in a file; the campaign goes on behind it.
"""

import json
import mmap
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.fuzz import campaign
from tests.fuzz.campaign import Report
from tests.fuzz.registry import make
from tests.fuzz.target import MIB

ROOT = Path(__file__).resolve().parents[2]
SPARE_BYTES = 1024 * MIB
"""What a process may take beside what it has when a campaign begins: more than any decoder's bound."""

_NOTE = struct.Struct("<Q")
_SILENT_S = 600.0
"""On one input, at most: a hundred times what the slowest decoder may take, on a machine that others have too."""


def run_apart(name: str, *, executions: int, seed: int, say: Callable[[str], None]) -> Report:
    """A campaign of one decoder in child processes; a new one after each that was lost."""
    total = Report(name)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="octavo-fuzz-") as home:
        note = Path(home) / "note"
        first = 0
        while first < executions:
            note.write_bytes(_NOTE.pack(first))
            part = _child(name, executions - first, first, seed, note, say)
            if part is None:
                (lost,) = _NOTE.unpack(note.read_bytes())
                total.crash(lost, "the process died or hung")
                say(total.shown[-1])
                total.executions += lost - first + 1
                first = lost + 1
                continue
            _add(total, part)
            first = executions
    total.seconds = round(time.monotonic() - began, 3)
    return total


def _child(name: str, executions: int, first: int, seed: int, note: Path, say: Callable[[str], None]) -> Report | None:
    numbers = {"--executions": executions, "--first": first, "--seed": seed}
    command = [sys.executable, "-m", "tests.fuzz", "child", name, "--note", str(note)]
    command += [word for key, value in numbers.items() for word in (key, str(value))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        text = _text_of(process, note)
    if text is None or process.returncode:
        return None
    *shown, last = text.splitlines()
    for line in shown:
        say(line)
    return Report(**json.loads(last))


def _text_of(process: subprocess.Popen[str], note: Path) -> str | None:
    """All that it prints; None for one that had to be killed because it stayed at one input."""
    was = note.read_bytes()
    while True:
        try:
            return process.communicate(timeout=_SILENT_S)[0]
        except subprocess.TimeoutExpired:
            now = note.read_bytes()
            if now == was:
                process.kill()
                process.communicate()
                return None
            was = now


def _add(total: Report, part: Report) -> None:
    total.executions += part.executions
    total.accepted += part.accepted
    total.crashes += part.crashes
    total.max_rss_growth = max(total.max_rss_growth, part.max_rss_growth)
    total.max_allocated = max(total.max_allocated, part.max_allocated)


def run_here(name: str, *, executions: int, first: int, seed: int, note: Path) -> None:
    """What a child process does; prints its report."""
    with tempfile.TemporaryDirectory(prefix="octavo-fuzz-") as home, note.open("r+b") as file:
        target = make(name, Path(home))
        for seed_input in target.seeds:
            target.decode(seed_input)  # what is imported or cached with the first use is not the inputs' doing
        limit = _virtual_bytes() + SPARE_BYTES + target.base_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        noted = mmap.mmap(file.fileno(), _NOTE.size)
        report = campaign.run(
            target,
            executions=executions,
            seed=seed,
            first=first,
            before=lambda number: _NOTE.pack_into(noted, 0, number),
        )
    for line in report.shown:
        print(line.replace("\n", "\n    "))
    print(json.dumps(report.line()), flush=True)
    sys.stdout.flush()
    os._exit(0)  # threads of libraries may be stuck where an alarm left them


def _virtual_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
