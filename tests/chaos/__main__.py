"""`python -m tests.chaos`: runs rows of the table, prints a JSON line for each, and a table on stderr at the end.

Exit status 0: every row held; 1: one did not; 2: nothing was run.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

for _name, _value in (
    ("OMP_WAIT_POLICY", "PASSIVE"),
    ("OMP_NUM_THREADS", "1"),
    ("RAY_AUTH_MODE", "token"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
    ("TOKENIZERS_PARALLELISM", "false"),
):
    os.environ.setdefault(_name, _value)  # before anything imports Ray or torch

from rich.console import Console  # noqa: E402

from actors.front.proxy_guard import TELL_VARIABLE  # noqa: E402
from tests.chaos import report  # noqa: E402
from tests.chaos.figures import Finding  # noqa: E402
from tests.chaos.models import model_named  # noqa: E402
from tests.chaos.row import Row, choose  # noqa: E402
from tests.chaos.session import Session, Settings  # noqa: E402

WIDE = 220


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = _console()
    try:
        rows = choose(options.rows)
    except ValueError as error:
        console.print(f"chaos: {error}", markup=False)
        return 2
    if options.list:
        report.show_rows(console, rows)
        return 0
    os.environ.setdefault(TELL_VARIABLE, "1")
    with tempfile.TemporaryDirectory(prefix="octavo-chaos-") as home:
        findings = asyncio.run(_run(rows, options, Path(home), console))
    report.show(console, rows, findings)
    return 0 if all(one.held for one in findings) else 1


async def _run(rows: list[Row], options: argparse.Namespace, home: Path, console: Console) -> list[Finding]:
    began_s = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[{time.monotonic() - began_s:6.1f}] {text}", markup=False, soft_wrap=True)

    def found(finding: Finding) -> None:
        line = report.json_line(finding)
        print(line, flush=True)
        if options.json_out is not None:
            with options.json_out.open("a") as out:
                out.write(line + "\n")

    settings = Settings(
        model=model_named(options.model, home),
        home=home,
        seed=options.seed,
        repeats=options.repeats,
        streams=options.streams,
        soak_s=options.soak_s,
    )
    session = Session(settings, say)
    try:
        return await session.run(rows, found)
    finally:
        await session.close()


def _console() -> Console:
    """Into a pipe or a file nothing is folded."""
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=WIDE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--rows", default="", help="ids, e.g. F1,F3; all without it")
    parser.add_argument("--list", action="store_true", help="show the rows and run nothing")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, sampling, victims and moments")
    parser.add_argument("--model", default="tiny", choices=("tiny", "demo"))
    parser.add_argument("--repeats", type=_positive, help="trials of each row; each row's own number without it")
    parser.add_argument("--streams", type=_positive, help="concurrent streams; the model's own number without it")
    parser.add_argument("--soak-s", type=float, default=600.0, help="seconds of the soak (S1)")
    parser.add_argument("--json-out", type=Path, help="file to which the JSON lines are added")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
