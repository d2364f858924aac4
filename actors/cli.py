"""The `octavo` command: what can be typed, and how a failure is said. The work is done by the modules it calls."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import actors
from actors.command.added_commands import CommandGroup
from actors.command.experts_app import app as experts_app
from actors.command.experts_app import ask_for_a_token, terminal
from actors.command.keys_app import app as keys_app

app = typer.Typer(
    cls=CommandGroup,
    help="Serve Mixtral-shaped models from a Ray cluster in which every expert is a service of its own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(experts_app, name="experts")
app.add_typer(keys_app, name="keys")

Address = Annotated[
    str | None, typer.Option(help="Ray cluster to use; without it a local one is started (status: found).")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"octavo {actors.__version__}")
        raise typer.Exit


@app.callback()
def octavo(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")] = False,
) -> None:
    """Serve Mixtral-shaped models from a Ray cluster in which every expert is a service of its own."""


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Checkpoint directory; the demo model without it.")] = None,
    host: Annotated[str, typer.Option(help="Where HTTP listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port.", min=1, max=65535)] = 8000,
    api_keys_file: Annotated[
        str | None, typer.Option("--api-keys", help="File of API keys, see octavo keys; or OCTAVO_API_KEY, one key.")
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Without keys, listen beyond this machine.")] = False,
    cors_origins: Annotated[
        str | None, typer.Option("--cors-origins", help="Origins of web pages that may ask, with commas.")
    ] = None,
    address: Address = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name clients use.")] = None,
    device: Annotated[str, typer.Option(help="Coordinators: auto, cpu or cuda.")] = "auto",
    experts_device: Annotated[str, typer.Option(help="Experts: auto, cpu or cuda.")] = "auto",
    replicas: Annotated[int, typer.Option(help="Copies of every expert.")] = 1,
    coordinators: Annotated[int, typer.Option(help="Coordinator actors.")] = 1,
    ingresses: Annotated[int, typer.Option(help="Replicas of the HTTP front door.")] = 1,
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
    prefix_caching: Annotated[bool, typer.Option(help="Reuse what a prompt shares with earlier ones.")] = True,
    enable_return_routed_experts: Annotated[
        bool, typer.Option("--enable-return-routed-experts", help="Say in answers which experts each token took.")
    ] = False,
    kv_cache_gib: Annotated[float | None, typer.Option(help="KV cache of a coordinator, GiB.")] = None,
    balance: Annotated[str, typer.Option(help="Follow the experts' load: off, dry_run or on.")] = "off",
    balance_policy: Annotated[str, typer.Option(help="A shipped policy or module:function.")] = "incremental",
    expert_slots: Annotated[int | None, typer.Option(help="Experts a node may hold; as memory allows.")] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="Trace requests: base URL of an OpenTelemetry collector (OTLP over HTTP).")
    ] = None,
    bind_host: Annotated[
        str, typer.Option(help="Where the gRPC plane listens; node: each process at its own machine's address.")
    ] = "127.0.0.1",
    grpc_client_token_file: Annotated[
        str | None, typer.Option(help="Tokens of programs that may call Generate over gRPC: NAME TOKEN, one a line.")
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(help="Certificate file of the gRPC plane.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="Key file of the gRPC plane.")] = None,
    tls_ca: Annotated[str | None, typer.Option(help="CA file: clients must show a certificate.")] = None,
    tls_server_name: Annotated[
        str | None, typer.Option(help="Name in the certificates, where that is not the address.")
    ] = None,
) -> None:
    """Start the cluster and its OpenAI-compatible HTTP front door; Ctrl-C drains and stops everything."""
    ask_for_a_token(address)
    from actors.command import serve as serve_command
    from actors.command.demo_model import ensure_demo_model
    from cluster.config import ClusterConfig, from_environment

    if model is None and "OCTAVO_MODEL" not in os.environ:
        model = str(ensure_demo_model(console=terminal()))
    fields = {field.name for field in dataclasses.fields(ClusterConfig)}
    arguments: dict[str, Any] = {name: value for name, value in locals().items() if name in fields}
    if kv_cache_gib is not None:
        arguments["kv_cache_bytes"] = int(kv_cache_gib * 2**30)
    arguments["model"] = model or os.environ["OCTAVO_MODEL"]
    config = from_environment(ClusterConfig(**arguments), _environment_below(context))
    serve_command.check_access(config, host, no_auth=no_auth)
    serve_command.serve(config, host=host, port=port, address=address, console=terminal())


@app.command()
def status(
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="The stable machine-readable form.")] = False,
    namespace: Annotated[str, typer.Option(help="The cluster's namespace.")] = "octavo",
) -> None:
    """Show coordinators, expert replicas and expert load of a running cluster."""
    ask_for_a_token(address)
    from actors.command.status import current_status
    from actors.supervision.status import render

    found = current_status(address, namespace)
    if as_json:
        print(found.to_json())
    else:
        terminal(stderr=False).print(render(found))


@app.command()
def top(
    url: Annotated[
        str | None, typer.Option(help="Front door to look through, as http://host:8000; its supervisor without it.")
    ] = None,
    api_key_env: Annotated[str, typer.Option(help="Variable that has the key, with --url.")] = "OCTAVO_API_KEY",
    interval: Annotated[float, typer.Option(help="Seconds between looks at the supervisor.", min=0.2, max=60)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    address: Address = None,
    namespace: Annotated[str, typer.Option(help="The cluster's namespace.")] = "octavo",
) -> None:
    """Watch load by layer and expert, replicas and queues of a running cluster; q or Ctrl-C ends it."""
    console = terminal(stderr=False)
    if url is None:
        ask_for_a_token(address)
    from actors.command import top as top_command

    if url is not None:
        top_command.top_by_url(url, os.environ.get(api_key_env), once=once, console=console)
    else:
        top_command.top_by_supervisor(address, namespace, interval, once=once, console=console)


@app.command()
def balance(
    address: Address = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what the policy would do.")] = False,
    mode: Annotated[str | None, typer.Option(help="Switch the loop off, dry_run or on instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The machine-readable form.")] = False,
    namespace: Annotated[str, typer.Option(help="The cluster's namespace.")] = "octavo",
) -> None:
    """Ask the balancing policy now, and make its moves; or switch the loop that does so."""
    ask_for_a_token(address)
    from actors.command.balance import ask_to_balance, switch

    if mode is not None:
        switch(address, namespace, mode)
    else:
        ask_to_balance(address, namespace, dry_run=dry_run, as_json=as_json, console=terminal(stderr=False))


@app.command("drain-node")
def drain_node(
    address: Address = None,
    timeout: Annotated[float, typer.Option(help="Seconds at most.", min=0)] = 30.0,
    settle: Annotated[float, typer.Option(help="Seconds at least, until everybody has heard of it.", min=0)] = 5.0,
    http_port: Annotated[int, typer.Option(help="Of the front door here.", min=1, max=65535)] = 8000,
    namespace: Annotated[str, typer.Option(help="The cluster's namespace.")] = "octavo",
) -> None:
    """Before the machine on which this is typed goes: move its experts, let its requests end."""
    ask_for_a_token(address)
    from actors.command.drain_node import drain_node as drain_here

    drain_here(
        address, namespace, timeout_s=timeout, settle_s=settle, http_port=http_port, console=terminal(stderr=False)
    )


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
    console = terminal(stderr=False)
    run_chat(conversation, console, lambda: console.input("[bold]> [/bold]"))


@app.command()
def verify(
    model: Annotated[Path | None, typer.Argument(help="Checkpoint directory; the demo model without it.")] = None,
    quick: Annotated[bool, typer.Option(help="Names, shapes and sizes only; who loads checks bytes.")] = False,
    make: Annotated[bool, typer.Option(help="Where there is no manifest, make one of the files as they are.")] = False,
) -> None:
    """Hold a checkpoint to its manifest; exit status 1 when it differs, or has none."""
    from actors.command.demo_model import ensure_demo_model
    from actors.command.verify import verify as verify_model

    verify_model(model or ensure_demo_model(console=terminal()), quick=quick, make=make, console=terminal())


@app.command()
def upcycle(
    source: Annotated[Path, typer.Argument(help="Dense checkpoint: a directory of safetensors, or a .gguf file.")],
    dest: Annotated[Path, typer.Argument(help="Where the Mixtral checkpoint goes; must not exist.")],
    experts: Annotated[int, typer.Option(help="Experts a layer.", min=2, max=256)] = 8,
    top_k: Annotated[int, typer.Option(help="Experts a token.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Of the router's clustering.")] = 0,
) -> None:
    """Turn a dense checkpoint into a mixture of experts that says the same (sparse upcycling)."""
    from actors.command.upcycling import upcycle_with_progress

    upcycle_with_progress(source, dest, num_experts=experts, top_k=top_k, seed=seed, console=terminal())


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


if __name__ == "__main__":
    main()
