"""One run of `octavo bench front`: a cluster with its front door, the ways into it, what is asked, what is said.

What the figures mean is said in `experiments.front_bench`; what can be typed is `experiments.bench_front_cli`'s.
"""

import asyncio
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from actors import ray_runtime, ray_serve
from actors.front.coordinator_client import CoordinatorClient
from actors.ingress import build_app, limits_of
from actors.supervision.launch import ensure_cluster
from cluster.config import ClusterConfig
from experiments.engine_bench.cluster import ClusterContestant
from experiments.engine_bench.report import JsonLines
from experiments.engine_bench.session import prompt_maker, stop_on_signals, stopping_in_order
from experiments.front_bench import __doc__ as definitions
from experiments.front_bench.http_process import start_http_process
from experiments.front_bench.measure import (
    Latency,
    Throughput,
    latencies,
    latency_summary,
    throughput,
    throughput_summary,
)
from experiments.front_bench.ways import EngineWay, HttpWay, Way, Wish, open_session
from model.storage.checkpoint import Checkpoint
from model.text.tokenizer import load_tokenizer

HOST = "127.0.0.1"
NUM_WARM = 4
REQUEST_TIMEOUT_S = 600.0
OVERHEAD_BAR_MS = 10.0
THROUGHPUT_BAR = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`requests` alone by each way, then `rounds` of `streams` at once with answers of `output_len`; 0 leaves out."""

    config: ClusterConfig
    prompt_len: int
    requests: int
    rounds: int
    streams: int
    output_len: int
    seed: int


def run(plan: Plan, out: JsonLines, console: Console) -> None:
    """Measures on a cluster of its own. Raises BenchError or what starting a cluster raises."""
    checkpoint = Checkpoint.open(Path(plan.config.model))
    texts = _texts(plan, checkpoint)
    with stopping_in_order() as undo:
        console.print("starting Ray ...")
        ray_runtime.start_local(plan.config.namespace)
        undo.callback(ray_runtime.disconnect)
        stop_on_signals()
        cluster = ClusterContestant("octavo", plan.config, len(os.sched_getaffinity(0)), console)
        undo.callback(cluster.close)
        port = _free_port()
        ray_serve.start_http(HOST, port)
        ray_serve.deploy(build_app(cluster.config), name=plan.config.namespace)
        undo.callback(ray_serve.undeploy, plan.config.namespace)
        endpoints = asyncio.run(ensure_cluster(cluster.config))
        beside = start_http_process(endpoints, REQUEST_TIMEOUT_S, limits_of(plan.config).max_requests)
        undo.callback(beside.close)
        urls = {"http": str(beside.facts["url"]), "serve": f"http://{HOST}:{port}"}
        out.write(_setup(plan, checkpoint, cluster))

        async def work(client: CoordinatorClient) -> None:
            async with open_session() as session:
                https = [HttpWay(name, session, url, endpoints.served_model_name) for name, url in urls.items()]
                await _measure(plan, texts, EngineWay(client), https, client, out, console)

        cluster.measure(work)


def _texts(plan: Plan, checkpoint: Checkpoint) -> list[str]:
    """Of about `prompt_len` tokens each. Raises BenchError or TokenizerError."""
    count = NUM_WARM + max(plan.requests, plan.streams)
    tokenizer = load_tokenizer(checkpoint.path)
    return [tokenizer.decode(ids) for ids in prompt_maker(checkpoint)(count, plan.prompt_len, plan.seed)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _setup(plan: Plan, checkpoint: Checkpoint, cluster: ClusterContestant) -> dict[str, object]:
    return {
        "type": "setup",
        "model": checkpoint.path.name,
        "weights_id": checkpoint.weights_id,
        "definitions": definitions,
        "prompt_len": plan.prompt_len,
        "streams": plan.streams,
        "output_len": plan.output_len,
        "cores": len(os.sched_getaffinity(0)),
        **cluster.facts,
    }


async def _measure(
    plan: Plan,
    texts: Sequence[str],
    engine: EngineWay,
    https: Sequence[HttpWay],
    client: CoordinatorClient,
    out: JsonLines,
    console: Console,
) -> None:
    ways: list[Way] = [engine, *https]
    prompts = [(text, await https[0].token_ids(text)) for text in texts]
    short = [Wish(text=text, token_ids=ids, output_len=1, salt="ttft") for text, ids in prompts]
    await latencies(ways, short[:NUM_WARM], client.snapshot)
    if plan.requests:
        done = await latencies(ways, short[NUM_WARM:][: plan.requests], client.snapshot)
        _tell_latency(done, out, console)
    wishes = [
        Wish(text=text, token_ids=ids, output_len=plan.output_len, salt="streams")
        for text, ids in prompts[: plan.streams]
    ]
    served, *beside = reversed(ways)
    rounds: list[Throughput] = []
    for number in range(plan.rounds):
        for way in (served, *reversed(beside), served):  # what is compared lies between two of the other
            one = await throughput(way, wishes, number + 1)
            rounds.append(one)
            out.write(one.to_json())
            console.print(f"  round {one.round}, {one.way}: {one.tokens_per_s:.1f} tok/s", markup=False)
    if rounds:
        _tell_throughput(plan, rounds, out, console)


def _tell_latency(done: Sequence[Latency], out: JsonLines, console: Console) -> None:
    for line in latency_summary(done):
        out.write(line)
        trip = line["roundtrip_ms"]
        beside = "" if trip is None else f", GET /version {trip:.1f} ms"
        console.print(
            f"{line['way']}: first token after {line['ttft_ms']:.1f} ms, of which {line['steps_ms']:.1f} are the "
            f"engine's step and {line['overhead_ms']:.1f} (p90 {line['p90_overhead_ms']:.1f}) are not; "
            f"{line['over_engine_ms']:.1f} above the engine's own way (the bar is {OVERHEAD_BAR_MS:.0f}){beside}",
            markup=False,
            soft_wrap=True,
        )


def _tell_throughput(plan: Plan, rounds: Sequence[Throughput], out: JsonLines, console: Console) -> None:
    for line in throughput_summary(rounds):
        out.write(line)
        console.print(
            f"{line['way']}: {line['tokens_per_s']:.1f} tok/s with {plan.streams} streams, {line['of_engine']:.2f} of "
            f"the engine's own way (the bar is {THROUGHPUT_BAR})",
            markup=False,
            soft_wrap=True,
        )
