"""`octavo experts`: what a person may do to expert replicas by hand. Light to import; the work is the supervisor's."""

import os
from typing import Annotated

import typer
from rich.console import Console

WIDE = 200

app = typer.Typer(help="List, replicate, drain, fold and unfold expert replicas of a running cluster.")

Address = Annotated[str | None, typer.Option(help="Ray cluster to use; found without it.")]
Namespace = Annotated[str, typer.Option(help="The cluster's namespace.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Return when it is done, or at once.")]


@app.command("list")
def list_replicas(address: Address = None, namespace: Namespace = "octavo") -> None:
    """Every expert replica: what it holds, where it is, how it fares."""
    ask_for_a_token(address)
    from actors.command.balance import list_experts

    list_experts(address, namespace, terminal(stderr=False))


@app.command()
def replicate(
    expert: Annotated[int, typer.Argument(help="The expert.", min=0)],
    layers: Annotated[str | None, typer.Option(help="First and last layer, as 0-15; all without it.")] = None,
    node: Annotated[str | None, typer.Option(help="Node id, or its beginning; the roomiest without it.")] = None,
    address: Address = None,
    namespace: Namespace = "octavo",
    wait: Wait = True,
) -> None:
    """One more replica of an expert, on another node."""
    ask_for_a_token(address)
    from actors.command.balance import replicate_expert

    replicate_expert(address, namespace, expert, layers, node, wait=wait, console=terminal(stderr=False))


@app.command()
def drain(
    replica: Annotated[str, typer.Argument(help="Its id, as in `octavo experts list`.")],
    address: Address = None,
    namespace: Namespace = "octavo",
    wait: Wait = True,
) -> None:
    """A replica answers what it has, and ends; the last copy of anything stays."""
    ask_for_a_token(address)
    from actors.command.balance import drain_replica

    drain_replica(address, namespace, replica, wait=wait, console=terminal(stderr=False))


@app.command()
def fold(
    processes: Annotated[int, typer.Argument(help="Processes for all experts, e.g. 4.", min=1)],
    address: Address = None,
    namespace: Namespace = "octavo",
    wait: Wait = True,
) -> None:
    """All experts in so many processes, more or fewer than now, while they serve."""
    ask_for_a_token(address)
    from actors.command.balance import fold_experts

    fold_experts(address, namespace, processes, wait=wait, console=terminal(stderr=False))


def ask_for_a_token(address: str | None) -> None:
    """A local cluster asks for Ray's token, whatever shell the command is typed in. Call it before Ray is imported."""
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def terminal(*, stderr: bool = True) -> Console:
    """Progress goes to stderr, answers to stdout; into a pipe or file nothing is folded."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=WIDE)
