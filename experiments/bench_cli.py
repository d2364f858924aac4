"""`octavo bench`: the list of benchmarks. Each lives in a file of its own and imports its work only when it is run.

`actors.cli` finds this app by its entry point; `python -m experiments.bench_cli` runs it without one.
"""

import os
import sys

import typer

from actors.command.added_commands import CommandError
from experiments.bench_engine_cli import engine
from experiments.bench_front_cli import front
from experiments.bench_prefix_cli import prefix
from experiments.bench_serve_cli import ServeCommand, serve

app = typer.Typer(
    help="Measure a model in the cluster, or a server over HTTP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.command()(engine)
app.command()(front)
app.command()(prefix)
app.command(cls=ServeCommand)(serve)


def main() -> None:
    """Runs the command line; a failure that has a name is one line on stderr and exit status 1."""
    try:
        app()
    except CommandError as error:
        if os.environ.get("OCTAVO_TRACEBACK"):
            raise
        print(f"octavo bench: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
