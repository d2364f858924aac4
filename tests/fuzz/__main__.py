"""`python -m tests.fuzz`: hostile input by the million, a line of JSON for each thing that was fuzzed.

    python -m tests.fuzz [decoders] --executions 1000000 --seed 1 [--only lane_request,submit] [--coverage]
    python -m tests.fuzz ports --messages 100000 [--only expert,lane]
    python -m tests.fuzz http --requests 100000 [--seconds 480] [--plain]

Exit status 0: everything kept its word; 1: something did not.
"""

import argparse
import json
import os
import sys
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0].startswith("-"):
        words.insert(0, "decoders")
    options = _parser().parse_args(words)
    status: int = options.run(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    kinds = parser.add_subparsers(required=True)
    decoders = kinds.add_parser("decoders")
    decoders.add_argument("--executions", type=int, default=1_000_000, help="of all decoders together")
    decoders.add_argument("--seed", type=int, default=1)
    decoders.add_argument("--only", default="", help="names, separated by commas")
    decoders.add_argument("--coverage", action="store_true", help="guided by coverage; needs atheris (extra: fuzz)")
    decoders.set_defaults(run=_decoders)
    ports = kinds.add_parser("ports")
    ports.add_argument("--messages", type=int, default=100_000, help="to each port")
    ports.add_argument("--seed", type=int, default=1)
    ports.add_argument("--only", default="", help="names of attacks, separated by commas")
    ports.set_defaults(run=_ports)
    http = kinds.add_parser("http")
    http.add_argument("--requests", type=int, default=100_000)
    http.add_argument("--seconds", type=float, default=float("inf"), help="ends then, however many that were")
    http.add_argument("--seed", type=int, default=1)
    http.add_argument("--plain", action="store_true", help="a cluster in one process without Ray")
    http.set_defaults(run=_http)
    child = kinds.add_parser("child")
    child.add_argument("name")
    for number in ("--executions", "--first", "--seed"):
        child.add_argument(number, type=int, required=True)
    child.add_argument("--note", type=Path, required=True)
    child.add_argument("--coverage", type=Path, default=None)
    child.set_defaults(run=_child)
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _decoders(options: argparse.Namespace) -> int:
    from tests.fuzz.campaign import Report
    from tests.fuzz.shares import names_of, shares

    crashes = 0
    for name, executions in shares(names_of(options.only), options.executions).items():
        report: Report
        if options.coverage:
            from tests.fuzz.coverage_guided import run_guided

            report = run_guided(name, executions=executions, seed=options.seed, say=_say)
        else:
            from tests.fuzz.workers import run_apart

            report = run_apart(name, executions=executions, seed=options.seed, say=_say)
        print(json.dumps(report.line()), flush=True)
        crashes += report.crashes
    return 1 if crashes else 0


def _child(options: argparse.Namespace) -> int:
    if options.coverage is not None:
        from tests.fuzz.coverage_guided import run_here as guided

        guided(options.name, executions=options.executions, seed=options.seed, note=options.note)
        return 0
    from tests.fuzz.workers import run_here

    run_here(options.name, executions=options.executions, first=options.first, seed=options.seed, note=options.note)
    return 0


def _ports(options: argparse.Namespace) -> int:
    from tests.fuzz.ports import run_ports

    return run_ports(messages=options.messages, seed=options.seed, only=options.only)


def _http(options: argparse.Namespace) -> int:
    from tests.fuzz.http_campaign import run_http, run_plain_http

    run = run_plain_http if options.plain else run_http
    return run(requests=options.requests, seconds=options.seconds, seed=options.seed)


if __name__ == "__main__":
    sys.exit(main())
