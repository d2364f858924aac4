"""`octavo trace`: what can be typed. The work is done by `experiments.simulation`, imported when it is run."""

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Routing traces: record one from a running cluster, make one from chance, or look at one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def stats(
    file: Annotated[Path, typer.Argument(help="A routing trace (.npz).")],
) -> None:
    """Print what is in a routing trace as JSON: sizes, rates, skew and locality."""
    import json

    from experiments.simulation.commands import load, trace_stats

    print(json.dumps(trace_stats(load(file)), indent=1, allow_nan=False))


@app.command()
def record(
    out: Annotated[Path, typer.Argument(help="The file to write (.npz).")],
    duration: Annotated[
        str | None, typer.Option("--for", help="How long: 60s, 5m, 1h; until Ctrl-C without it.")
    ] = None,
    requests: Annotated[int | None, typer.Option(help="End when so many requests have come and ended.", min=1)] = None,
    max_tokens: Annotated[int, typer.Option(help="End at so many tokens of routing.", min=1)] = 5_000_000,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use; found without it.")] = None,
    namespace: Annotated[str, typer.Option(help="The cluster's namespace.")] = "octavo",
) -> None:
    """Record which experts tokens take in a running cluster, and when requests come. Never what the tokens are.

    Requests that came before it began are not counted as arrivals, their tokens are recorded; of one that has not
    ended, the tokens so far count.
    """
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as a local cluster does; before Ray is imported
    from experiments.trace_record import Enough, record_command, seconds_of

    seconds = None if duration is None else seconds_of(duration)
    enough = Enough(seconds=seconds, requests=requests, max_tokens=max_tokens)
    record_command(out, enough, address=address, namespace=namespace)


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="The file to write (.npz).")],
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 32,
    experts: Annotated[int, typer.Option(help="Experts of a layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 2,
    skew: Annotated[str, typer.Option(help="zipf:EXPONENT or dirichlet:CONCENTRATION, per layer.")] = "zipf:0.8",
    stickiness: Annotated[float, typer.Option(help="Chance that a token keeps the last token's first expert.")] = 0.15,
    drift_s: Annotated[
        float, typer.Option(help="Seconds from one popularity to the next; inf does not drift.")
    ] = 300.0,
    tokens: Annotated[int, typer.Option(help="Tokens of routing to keep, evenly over the duration.")] = 20_000,
    duration_s: Annotated[float, typer.Option(help="Length of the trace in seconds.")] = 600.0,
    requests: Annotated[
        Path | None, typer.Option(help="Arrivals and lengths: Azure's .csv or Mooncake's .jsonl; Poisson without it.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests a second (by day, at noon).")] = 1.0,
    prompt: Annotated[int, typer.Option(help="Mean prompt tokens, without --requests.")] = 256,
    output: Annotated[int, typer.Option(help="Mean output tokens, without --requests.")] = 128,
    day: Annotated[bool, typer.Option("--day", help="Let the rate follow a day: low, high, low.")] = False,
    night: Annotated[float, typer.Option(help="Rate at night over the rate at noon, with --day.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of everything that is left to chance.")] = 0,
) -> None:
    """Write a routing trace made from chance: popularity that drifts, tokens that follow each other."""
    from experiments.simulation.commands import RequestSettings, make_trace, parse_skew, save
    from experiments.simulation.synthetic_routing import RoutingModel

    law, strength = parse_skew(skew)
    model = RoutingModel(
        num_layers=layers,
        num_experts=experts,
        top_k=top_k,
        law=law,
        skew=strength,
        drift_s=drift_s,
        stickiness=stickiness,
    )
    asked = RequestSettings(
        path=requests, rate=rate, duration_s=duration_s, prompt=prompt, output=output, night=night if day else None
    )
    trace = make_trace(model, asked, num_tokens=tokens, seed=seed)
    save(trace, out)
    print(f"{out}: {len(trace.arrival_s)} requests, {len(trace.experts)} tokens of routing")


if __name__ == "__main__":
    from experiments.simulation.commands import run_app

    run_app(app, "trace")
