"""`octavo experiment`: what can be typed. The work is done by `experiments.scenario`, imported when it is run."""

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def experiment(
    config: Annotated[Path, typer.Argument(help="A scenario (.yaml); some are in experiments/scenarios.")],
    simulated: Annotated[bool, typer.Option("--simulated", help="On a virtual clock; the default.")] = False,
    live: Annotated[bool, typer.Option("--live", help="On a real cluster of this machine.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only read and check the scenario.")] = False,
    fidelity: Annotated[
        bool, typer.Option("--fidelity", help="Run live, predict the later phases by the first ones, compare.")
    ] = False,
    ranking: Annotated[
        bool, typer.Option("--ranking", help="Run live and simulated under every policy, compare figures and order.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report here.")] = None,
) -> None:
    """Run a declarative scenario under several policies. A JSON line for each run on stdout, a report with --html."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported
    from actors.command.added_commands import CommandError
    from experiments.scenario import commands

    if simulated + live + fidelity + ranking > 1:
        raise CommandError("--simulated, --live, --fidelity and --ranking exclude each other")
    scenario = commands.load_scenario(config)
    if check:
        print(commands.check_text(config, scenario))
        return
    if fidelity:
        from rich.console import Console

        commands.compare_worlds(scenario, Console(stderr=True, highlight=False))
        return
    where = "live" if live else "simulated"
    if ranking:
        from rich.console import Console

        where = "live and simulated"
        results = commands.rank_policies(scenario, Console(stderr=True, highlight=False))
    elif not live:
        results = commands.run_scenario(scenario, commands.simulated_run(scenario), "simulated")
    else:
        from rich.console import Console

        with commands.live_run(scenario, Console(stderr=True, highlight=False)) as run:
            results = commands.run_scenario(scenario, run, "live")
    if html is not None:
        commands.write_report(html, scenario, where, results)


if __name__ == "__main__":
    from experiments.simulation.commands import run_app

    run_app(app, "experiment")
