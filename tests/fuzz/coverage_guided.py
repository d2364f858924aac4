"""Campaigns that follow coverage, by atheris where it is installed (extra `fuzz`): it keeps inputs that reach new code.

One process a decoder, whose first inputs are the decoder's good ones. The first crash ends a campaign: libFuzzer's way.
What is a crash is as in `tests.fuzz.campaign`, but for memory, which libFuzzer bounds as a whole.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.campaign import Report
from tests.fuzz.workers import ROOT

INSTRUMENTED = ["protos", "model.storage", "model.text", "model.upcycling", "cluster", "actors.front", "jinja2"]
LIMIT_MB = 4096
MAX_INPUT_BYTES = 1 << 16
_SECONDS_EACH = 20


def available() -> bool:
    """Whether atheris is installed."""
    return importlib.util.find_spec("atheris") is not None


def run_guided(name: str, *, executions: int, seed: int, say: Callable[[str], None]) -> Report:
    """A campaign of one decoder. Raises SystemExit where atheris is missing."""
    if not available():
        raise SystemExit("atheris is not installed: pip install 'octavo[fuzz]'")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="octavo-fuzz-") as home:
        note = Path(home) / "report"
        command = [sys.executable, "-m", "tests.fuzz", "child", name, "--note", str(note), "--coverage", home]
        command += ["--executions", str(executions), "--first", "0", "--seed", str(seed)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        report = Report(**json.loads(note.read_text())) if note.is_file() else Report(name, crashes=1)
    if done.returncode and not report.crashes:
        report.crashes = 1
    if report.crashes:
        say(f"{name}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    report.seconds = round(time.monotonic() - began, 3)
    return report


def run_here(name: str, *, executions: int, seed: int, note: Path) -> None:
    """What a child process does. The report is written as it goes: libFuzzer does not come back."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.registry import make

        home = Path(tempfile.mkdtemp(prefix="octavo-fuzz-"))
        target = make(name, home)
    report = Report(name)
    good = home / "good"
    good.mkdir()
    for number, seed_input in enumerate(target.seeds):
        (good / str(number)).write_bytes(seed_input)

    def one(data: bytes) -> None:
        report.executions += 1
        if report.executions % 256 == 1 or report.executions >= executions:
            note.write_text(json.dumps(report.line()))
        try:
            target.decode(target.repair(data) if target.repair is not None and len(data) % 2 else data)
            report.accepted += 1
        except target.errors:
            pass
        except BaseException:
            report.crashes += 1
            note.write_text(json.dumps(report.line()))
            raise

    options = [f"-runs={executions}", f"-seed={seed}", f"-max_len={MAX_INPUT_BYTES}", f"-rss_limit_mb={LIMIT_MB}"]
    options += [f"-timeout={_SECONDS_EACH}", "-print_final_stats=1", f"-artifact_prefix={home}/"]
    atheris.Setup([sys.argv[0], *options, str(good)], one)
    atheris.Fuzz()
