"""`octavo bench front`: what can be typed. The work is `experiments.front_bench`'s.

JSON lines go to stdout, progress and the result to stderr.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def front(
    model: Annotated[str | None, typer.Argument(help="Checkpoint directory; the demo model without it.")] = None,
    prompt_len: Annotated[int, typer.Option(help="Tokens of a message.", min=1)] = 64,
    requests: Annotated[int, typer.Option(help="Requests alone, by each way; 0 for none.", min=0)] = 50,
    rounds: Annotated[int, typer.Option(help="Rounds of many streams at once; 0 for none.", min=0)] = 2,
    streams: Annotated[int, typer.Option(help="Streams at once.", min=1)] = 16,
    output_len: Annotated[int, typer.Option(help="Tokens of every stream.", min=1)] = 64,
    experts_per_actor: Annotated[int, typer.Option(help="Experts that share an actor.")] = 1,
    seed: Annotated[int, typer.Option(help="Chooses the prompts.")] = 0,
    json_out: Annotated[Path | None, typer.Option(help="File for the JSON lines, beside stdout.")] = None,
) -> None:
    """Measure what HTTP costs: time to the first token at idle and many streams, beside the engine's own way."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported
    from actors.command.demo_model import ensure_demo_model
    from cluster.config import ClusterConfig
    from experiments.engine_bench.failures import BenchError
    from experiments.engine_bench.report import JsonLines
    from experiments.front_bench import session

    console = Console(stderr=True, highlight=False)
    try:
        path = Path(model) if model is not None else ensure_demo_model(console=console)
        config = ClusterConfig(
            model=str(path),
            namespace=f"octavo-bench-front-{os.getpid()}",
            experts_per_actor=experts_per_actor,
        )
        plan = session.Plan(
            config=config,
            prompt_len=prompt_len,
            requests=requests,
            rounds=rounds,
            streams=streams,
            output_len=output_len,
            seed=seed,
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
