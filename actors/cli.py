"""The `octavo` command: what can be typed, and how a failure is said. The work is done by the modules it calls."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from actors.command.added_commands import CommandGroup

app = typer.Typer(
    cls=CommandGroup,
    help="Serve Mixtral-shaped models from a Ray cluster in which every expert is a service of its own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

WIDE = 200

Address = Annotated[
    str | None, typer.Option(help="Ray cluster to use; without it a local one is started (status: found).")
]


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Checkpoint directory; the demo model without it.")] = None,
    host: Annotated[str, typer.Option(help="Where HTTP listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port.", min=1, max=65535)] = 8000,
    address: Address = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name clients use.")] = None,
    device: Annotated[str, typer.Option(help="Coordinators: auto, cpu or cuda.")] = "auto",
    experts_device: Annotated[str, typer.Option(help="Experts: auto, cpu or cuda.")] = "auto",
    replicas: Annotated[int, typer.Option(help="Copies of every expert.")] = 1,
    coordinators: Annotated[int, typer.Option(help="Coordinator actors.")] = 1,
    experts_per_actor: Annotated[int, typer.Option(help="Experts that share one actor.")] = 1,
    transport: Annotated[str, typer.Option(help="Rows to experts: auto, shm (same machine only) or grpc.")] = "auto",
    kernel: Annotated[str, typer.Option(help="auto, fp32, fp16; for experts only: bf16, int8, fp8.")] = "auto",
    microbatches: Annotated[int | None, typer.Option(help="Microbatches of a step; measured without it.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of a prompt and its answer.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences in one step.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens in one step.")] = 512,
    max_waiting_requests: Annotated[int, typer.Option(help="Bound of the queue.")] = 256,
    speculation: Annotated[str, typer.Option(help="Guess tokens ahead: off or prompt_lookup.")] = "off",
    speculation_tokens: Annotated[int, typer.Option(help="Tokens guessed per step.")] = 4,
    kv_cache_gib: Annotated[float | None, typer.Option(help="KV cache of a coordinator, GiB.")] = None,
    bind_host: Annotated[str, typer.Option(help="Where the gRPC plane listens.")] = "127.0.0.1",
    tls_cert: Annotated[str | None, typer.Option(help="Certificate file of the gRPC plane.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="Key file of the gRPC plane.")] = None,
    tls_ca: Annotated[str | None, typer.Option(help="CA file: clients must show a certificate.")] = None,
) -> None:
    """Start the cluster and its OpenAI-compatible HTTP front door; Ctrl-C drains and stops everything."""
    from actors.command import serve as serve_command
    from actors.command.demo_model import ensure_demo_model
    from cluster.config import ClusterConfig, from_environment

    if model is None and "OCTAVO_MODEL" not in os.environ:
        model = str(ensure_demo_model(console=_console()))
    fields = {field.name for field in dataclasses.fields(ClusterConfig)}
    arguments: dict[str, Any] = {name: value for name, value in locals().items() if name in fields}
    if kv_cache_gib is not None:
        arguments["kv_cache_bytes"] = int(kv_cache_gib * 2**30)
    arguments["model"] = model or os.environ["OCTAVO_MODEL"]
    config = from_environment(ClusterConfig(**arguments), _environment_below(context))
    serve_command.serve(config, host=host, port=port, address=address, console=_console())


@app.command()
def status(
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="The stable machine-readable form.")] = False,
    namespace: Annotated[str, typer.Option(help="The cluster's namespace.")] = "octavo",
) -> None:
    """Show coordinators, expert replicas and expert load of a running cluster."""
    from actors.command.status import current_status
    from actors.supervision.status import render

    found = current_status(address, namespace)
    if as_json:
        print(found.to_json())
    else:
        _console(stderr=False).print(render(found))


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Base URL of the API.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str | None, typer.Option(help="Model name; the first listed without it.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0, max=2)] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
) -> None:
    """Talk to a model in the terminal. Ctrl-C stops an answer, Ctrl-D leaves."""
    import openai

    from actors.command.chat import Conversation
    from actors.command.chat import chat as run_chat

    messages = [{"role": "system", "content": system}] if system else []
    key = os.environ.get("OPENAI_API_KEY", "none")
    conversation = Conversation(
        openai.OpenAI(base_url=url, api_key=key, max_retries=0),
        model,
        {"temperature": temperature, "max_tokens": max_tokens},
        messages,
    )
    console = _console(stderr=False)
    run_chat(conversation, console, lambda: console.input("[bold]> [/bold]"))


@app.command()
def upcycle(
    source: Annotated[Path, typer.Argument(help="Dense checkpoint: a directory of safetensors, or a .gguf file.")],
    dest: Annotated[Path, typer.Argument(help="Where the Mixtral checkpoint goes; must not exist.")],
    experts: Annotated[int, typer.Option(help="Experts a layer.", min=2, max=256)] = 8,
    top_k: Annotated[int, typer.Option(help="Experts a token.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Of the router's clustering.")] = 0,
) -> None:
    """Turn a dense checkpoint into a mixture of experts that says the same (sparse upcycling)."""
    from actors.command.demo_model import upcycle_with_progress

    upcycle_with_progress(source, dest, num_experts=experts, top_k=top_k, seed=seed, console=_console())


def main() -> None:
    """Runs the command line; a failure that has a name is one line on stderr and exit status 1."""
    try:
        app()
    except Exception as error:  # the top of the process: known errors become one line
        if os.environ.get("OCTAVO_TRACEBACK"):
            raise
        from actors.command.failures import one_line

        print(f"octavo: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


def _environment_below(context: typer.Context) -> dict[str, str]:
    """The environment without what was typed: the command line is nearer."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    typed = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    typed_variables = {f"OCTAVO_{'kv_cache_bytes' if name == 'kv_cache_gib' else name}".upper() for name in typed}
    return {name: value for name, value in os.environ.items() if name not in typed_variables}


def _console(*, stderr: bool = True) -> Console:
    """Progress goes to stderr, answers to stdout; into a pipe or file nothing is folded."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=WIDE)


if __name__ == "__main__":
    main()
