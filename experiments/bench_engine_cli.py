"""`octavo bench engine`: what can be typed. The work is `experiments.engine_bench.session`'s.

Runs alone as `python -m experiments.bench_engine_cli`. JSON lines go to stdout, progress and tables to stderr.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

WIDE = 240


def engine(
    model: Annotated[str | None, typer.Argument(help="Checkpoint directory; the demo model without it.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences at once; may be repeated.")] = None,
    batches: Annotated[str | None, typer.Option(help="The same, as a list: 1,4,16,32.")] = None,
    prompt_len: Annotated[int, typer.Option(help="Tokens of every prompt.", min=1)] = 128,
    output_len: Annotated[int, typer.Option(help="Tokens of every answer.", min=2)] = 64,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats.", min=1)] = 3,
    transport: Annotated[list[str] | None, typer.Option(help="Data plane; repeated: variants to compare.")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Kernel; repeated: variants.")] = None,
    replicas: Annotated[list[int] | None, typer.Option(help="Copies of every expert; repeated: variants.")] = None,
    experts_per_actor: Annotated[
        list[int] | None, typer.Option(help="Experts that share an actor; repeated: variants.")
    ] = None,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens in one step of ours.")] = 512,
    peer: Annotated[list[str] | None, typer.Option(help="transformers, llama.cpp; may be repeated.")] = None,
    peer_python: Annotated[str | None, typer.Option(help="Interpreter that has the peers' libraries.")] = None,
    peer_env: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the peers' environment; may be repeated.")
    ] = None,
    synthetic: Annotated[
        str | None, typer.Option(help="Random weights in the layer shapes of: mixtral. Some GB, kept in the cache.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers of the synthetic model.", min=1)] = 2,
    kernel_speed: Annotated[
        bool | None, typer.Option(help="Measure the kernel alone too; with --synthetic by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the prompts.")] = 0,
    json_out: Annotated[Path | None, typer.Option(help="File for the JSON lines, beside stdout.")] = None,
) -> None:
    """Measure prefill and decode through a real cluster without HTTP, beside peers on the same checkpoint."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported
    from actors.command.cache_dir import user_cache_dir
    from actors.command.demo_model import ensure_demo_model
    from experiments.engine_bench import session
    from experiments.engine_bench.cells import cells, parse_batches, variants
    from experiments.engine_bench.failures import BenchError
    from experiments.engine_bench.peers.registry import parse_env
    from experiments.engine_bench.report import JsonLines
    from experiments.engine_bench.synthetic import synthetic_model

    console = _console()
    try:
        if synthetic is not None and model is not None:
            raise BenchError("MODEL and --synthetic exclude each other")
        cache_dir = user_cache_dir()
        chosen_cells = cells(parse_batches(batch or (), batches), prompt_len, output_len)
        chosen = variants(transport or ["auto"], kernel or ["auto"], replicas or [1], experts_per_actor or [1])
        if synthetic is not None:
            path = synthetic_model(synthetic, layers, cache_dir, lambda text: console.print(text, soft_wrap=True))
        else:
            path = Path(model) if model is not None else ensure_demo_model(console=console)
        plan = session.Plan(
            model=path,
            cells=chosen_cells,
            variants=chosen,
            peers=tuple(peer or ()),
            peer_python=peer_python or sys.executable,
            peer_env=parse_env(peer_env or ()),
            repeats=repeats,
            seed=seed,
            max_num_batched_tokens=max_num_batched_tokens,
            cache_dir=cache_dir,
            kernel_speed=kernel_speed if kernel_speed is not None else synthetic is not None,
        )
        lines = JsonLines(sys.stdout, json_out)
        try:
            session.run(plan, lines, console)
        finally:
            lines.close()
    except KeyboardInterrupt:
        console.print("stopped")
        raise typer.Exit(130) from None
    except BenchError as error:
        print(f"octavo: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def main() -> None:
    """The command alone, with the same manners as `octavo`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(engine)
    try:
        app()
    except Exception as error:  # the top of the process: known errors become one line
        if os.environ.get("OCTAVO_TRACEBACK"):
            raise
        from actors.command.failures import one_line

        print(f"octavo: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


def _console() -> Console:
    """Into a pipe or file nothing is folded."""
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=WIDE)


if __name__ == "__main__":
    main()
