"""`octavo bench prefix`: what can be typed. The work is `experiments.prefix_bench`'s.

JSON lines go to stdout, progress and the result to stderr.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def prefix(
    model: Annotated[str | None, typer.Argument(help="Checkpoint directory; the demo model without it.")] = None,
    prefix_len: Annotated[int, typer.Option(help="Tokens that prompts share.", min=1)] = 512,
    output_len: Annotated[int, typer.Option(help="Tokens of every answer, which are compared.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Beginnings.", min=1)] = 5,
    kernel: Annotated[str, typer.Option(help="Kernel.")] = "auto",
    experts_per_actor: Annotated[int, typer.Option(help="Experts that share an actor.")] = 1,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens in one step.")] = 512,
    seed: Annotated[int, typer.Option(help="Chooses the prompts.")] = 0,
    json_out: Annotated[Path | None, typer.Option(help="File for the JSON lines, beside stdout.")] = None,
) -> None:
    """Measure what a repeated prefix costs beside its first prefill, and compare the answers bit for bit."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported
    from actors.command.demo_model import ensure_demo_model
    from cluster.config import ClusterConfig
    from experiments import prefix_bench
    from experiments.engine_bench.failures import BenchError
    from experiments.engine_bench.report import JsonLines

    console = Console(stderr=True, highlight=False)
    try:
        path = Path(model) if model is not None else ensure_demo_model(console=console)
        config = ClusterConfig(
            model=str(path),
            namespace=f"octavo-bench-prefix-{os.getpid()}",
            kernel=kernel,  # type: ignore[arg-type]  # it checks that itself
            experts_per_actor=experts_per_actor,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        plan = prefix_bench.Plan(config=config, prefix_len=prefix_len, output_len=output_len, rounds=rounds, seed=seed)
        lines = JsonLines(sys.stdout, json_out)
        try:
            prefix_bench.run(plan, lines, console)
        finally:
            lines.close()
    except KeyboardInterrupt:
        console.print("stopped")
        raise typer.Exit(130) from None
    except BenchError as error:
        print(f"octavo: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
