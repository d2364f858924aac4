"""`octavo simulate`: what can be typed. The work is done by `experiments.simulation`, imported when it is run."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(help="A routing trace (.npz), as `octavo trace synth` writes.")],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="static, reactive, eplb, incremental or predictive, perhaps with options ('incremental max_moves=2, "
            "max_copies=3'); once for each. All but the last without it."
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(help="Expert hosts at the start.")] = 8,
    columns: Annotated[float, typer.Option(help="Whole experts that a host has memory for.")] = 2.0,
    ranges: Annotated[int, typer.Option(help="Layer ranges that move on their own; 1 is whole experts.")] = 1,
    autoscale: Annotated[
        str | None, typer.Option(help="MIN:MAX hosts, adds `+scale` to each policy but static. Fixed hosts without it.")
    ] = None,
    target_share: Annotated[float, typer.Option(help="Part of the time that steps may wait for experts.")] = 0.6,
    layer_mb: Annotated[float, typer.Option(help="One expert in one layer, in MB.")] = 352.0,
    call_us: Annotated[float, typer.Option(help="An expert call costs so much,")] = 500.0,
    token_us: Annotated[float, typer.Option(help="and so much for each token.")] = 20.0,
    step_us: Annotated[float, typer.Option(help="The coordinator's part of a step costs so much,")] = 2000.0,
    step_token_us: Annotated[float, typer.Option(help="and so much for each token.")] = 50.0,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that run at once.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of a step.")] = 1024,
    window_s: Annotated[float, typer.Option(help="The policy is asked so often.")] = 10.0,
    budget_gb: Annotated[
        float, typer.Option(help="Bytes that a policy may move when asked; EPLB knows no budget.")
    ] = 24.0,
    load_gb_s: Annotated[float, typer.Option(help="Speed of loading, in GB a second.")] = 2.0,
    host_start_s: Annotated[float, typer.Option(help="From asking for a host to having it.")] = 30.0,
    eplb_interval_s: Annotated[float, typer.Option(help="EPLB rearranges so often.")] = 60.0,
    html: Annotated[Path | None, typer.Option(help="Write the report here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures here.")] = None,
) -> None:
    """Run a trace on a virtual clock under each policy, and compare them. A table on stdout; a report with --html."""
    from experiments.simulation.commands import SimulationSettings, compare, load

    settings = SimulationSettings(
        policies=tuple(policy or ("static", "reactive", "eplb", "incremental")),
        nodes=nodes,
        columns=columns,
        ranges=ranges,
        autoscale=autoscale,
        target_share=target_share,
        layer_mb=layer_mb,
        call_us=call_us,
        token_us=token_us,
        step_us=step_us,
        step_token_us=step_token_us,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        window_s=window_s,
        budget_gb=budget_gb,
        load_gb_s=load_gb_s,
        host_start_s=host_start_s,
        eplb_interval_s=eplb_interval_s,
    )
    compare(load(trace), trace.name, settings, html=html, json_file=json)


if __name__ == "__main__":
    from experiments.simulation.commands import run_app

    run_app(app, "simulate")
