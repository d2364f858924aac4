"""What `octavo bench front` measures, by a real coordinator and a real front door in this process, without Ray."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from actors.channels import WireCredentials
from actors.front.http_app import create_app
from actors.supervision.launch import Endpoints
from cluster.config import ClusterConfig
from experiments.bench_cli import app
from experiments.engine_bench.failures import BenchError
from experiments.engine_bench.report import JsonLines
from experiments.front_bench import session
from experiments.front_bench.http_process import start_http_process
from experiments.front_bench.measure import (
    Latency,
    Throughput,
    latencies,
    latency_summary,
    throughput,
    throughput_summary,
)
from experiments.front_bench.session import Plan
from experiments.front_bench.ways import EngineWay, HttpWay, Wish, open_session
from model.storage.checkpoint import Checkpoint
from tests.support.checkpoints import write_mixtral
from tests.support.front import serving
from tests.support.tiny_cluster import TOKEN, TinyCluster, tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

pytestmark = pytest.mark.anyio

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TEXT = "a message"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("front")
    write_mixtral(path)
    write_byte_tokenizer(path, chat_template=TEMPLATE)
    return path


@pytest.fixture(scope="module")
async def cluster(checkpoint: Path) -> AsyncIterator[TinyCluster]:
    async with tiny_cluster(checkpoint) as running:
        yield running


@pytest.fixture(scope="module")
async def http(cluster: TinyCluster) -> AsyncIterator[HttpWay]:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(create_app(cluster.front)))
        session = await stack.enter_async_context(open_session())
        yield HttpWay("http", session, url, "tiny")


async def wish(http: HttpWay, output_len: int = 3) -> Wish:
    return Wish(text=TEXT, token_ids=await http.token_ids(TEXT), output_len=output_len, salt="s")


async def test_both_ways_ask_the_engine_for_the_same_tokens(cluster: TinyCluster, http: HttpWay) -> None:
    asked = await wish(http)
    for way in (EngineWay(cluster.client), http):
        before = await cluster.snapshot()
        told = await way.ask(asked)
        after = await cluster.snapshot()
        assert 0 < told.first_s <= told.whole_s
        assert after.generated_tokens_total - before.generated_tokens_total == asked.output_len
        asked = replace(asked, salt="another")
        assert after.prompt_tokens_total - before.prompt_tokens_total == len(asked.token_ids)
    assert await EngineWay(cluster.client).roundtrip() is None
    trip_s = await http.roundtrip()
    assert trip_s is not None
    assert trip_s > 0


async def test_answers_that_are_refused_or_too_short_are_no_figures(cluster: TinyCluster, http: HttpWay) -> None:
    asked = await wish(http)
    too_long = replace(asked, output_len=10**6)
    with pytest.raises(BenchError, match="http answers 400"):
        await http.ask(too_long)
    with pytest.raises(BenchError, match="ended a sequence early"):
        await EngineWay(cluster.client).ask(too_long)
    other = HttpWay("http", http._session, http._url, "another")
    with pytest.raises(BenchError, match="answers 404"):
        await other.ask(asked)
    with pytest.raises(BenchError, match="cannot tokenize"):
        await other.token_ids(TEXT)
    nowhere = HttpWay("nowhere", http._session, "http://127.0.0.1:9", "tiny")
    with pytest.raises(BenchError, match="nowhere gave no whole answer"):
        await throughput(nowhere, [asked] * 2, 1)


async def test_steps_are_those_of_the_request_itself(cluster: TinyCluster, http: HttpWay) -> None:
    wishes = [await wish(http, 1)] * 2
    done = await latencies([EngineWay(cluster.client), http], wishes, cluster.snapshot)
    assert [one.way for one in done] == ["engine", "http", "http", "engine"]
    for one in done:
        assert 0 < one.steps_s < one.ttft_s
        assert one.overhead_s == pytest.approx(one.ttft_s - one.steps_s)
        assert (one.roundtrip_s is None) == (one.way == "engine")
    # Nothing was found in the prefix cache: each had a salt of its own.
    assert (await cluster.snapshot()).prefix_hits_tokens_total == 0


async def test_many_streams_at_once(cluster: TinyCluster, http: HttpWay) -> None:
    before = await cluster.snapshot()
    one = await throughput(http, [await wish(http, 5)] * 3, 2)
    after = await cluster.snapshot()
    assert (one.way, one.round) == ("http", 2)
    assert after.generated_tokens_total - before.generated_tokens_total == 15
    assert one.tokens_per_s > 0
    assert one.to_json()["type"] == "throughput"


async def test_a_run_says_what_each_way_costs(cluster: TinyCluster, http: HttpWay, checkpoint: Path) -> None:
    plan = Plan(
        config=ClusterConfig(model=str(checkpoint)), prompt_len=8, requests=2, rounds=2, streams=3, output_len=4, seed=0
    )
    texts = session._texts(plan, Checkpoint.open(checkpoint))
    assert len(set(texts)) == session.NUM_WARM + 3
    served = HttpWay("serve", http._session, http._url, "tiny")
    out, told = io.StringIO(), io.StringIO()
    await session._measure(
        plan, texts, EngineWay(cluster.client), [http, served], cluster.client, JsonLines(out), Console(file=told)
    )
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(line["way"], line["requests"]) for line in lines[:3]] == [("engine", 2), ("http", 2), ("serve", 2)]
    assert all(line["type"] == "ttft" and line["overhead_ms"] > 0 for line in lines[:3])
    rounds = [line["way"] for line in lines if line["type"] == "throughput"]
    assert rounds == ["serve", "engine", "http", "serve"] * 2, "what is compared lies between two of the other"
    ratios = {line["way"]: line["of_engine"] for line in lines if line["type"] == "throughput_summary"}
    assert ratios.keys() == {"serve", "http", "engine"}
    assert ratios["engine"] == 1
    assert "of the engine's own way (the bar is 0.85)" in told.getvalue().replace("\n", " ")


async def test_the_front_door_in_a_process_of_its_own(cluster: TinyCluster, checkpoint: Path) -> None:
    endpoints = Endpoints(
        coordinators=(cluster.address,),
        credentials=WireCredentials(TOKEN),
        model_path=str(checkpoint),
        served_model_name="mine",
        max_model_len=cluster.front.max_model_len,
        system_fingerprint="fp",
    )
    beside = await asyncio.to_thread(start_http_process, endpoints, 60.0, 8)
    try:
        async with open_session() as session:
            way = HttpWay("http", session, str(beside.facts["url"]), "mine")
            told = await way.ask(await wish(way, 4))
            assert told.whole_s > 0
        with pytest.raises(BenchError, match="nothing to ask but over HTTP"):
            beside.ask({})
    finally:
        await asyncio.to_thread(beside.close)


def latency(way: str, ttft_ms: float, steps_ms: float, trip_ms: float | None = None) -> Latency:
    trip_s = None if trip_ms is None else trip_ms / 1e3
    return Latency(way=way, ttft_s=ttft_ms / 1e3, steps_s=steps_ms / 1e3, roundtrip_s=trip_s)


def test_overheads_are_paired_with_their_own_steps() -> None:
    engine = [latency("engine", 12, 10), latency("engine", 33, 30), latency("engine", 22, 20)]
    served = [latency("serve", 18, 10, 4), latency("serve", 40, 30, 6), latency("serve", 29, 20, 5)]
    first, second = latency_summary([*engine, *served])
    assert (first["way"], first["requests"], first["roundtrip_ms"]) == ("engine", 3, None)
    assert first["overhead_ms"] == pytest.approx(2)
    assert first["over_engine_ms"] == 0
    assert (second["ttft_ms"], second["steps_ms"]) == (pytest.approx(29), pytest.approx(20))
    assert second["overhead_ms"] == pytest.approx(9)
    assert second["over_engine_ms"] == pytest.approx(7)
    assert second["roundtrip_ms"] == pytest.approx(5)


def test_throughput_is_the_median_of_rounds_and_of_the_engine() -> None:
    values = {"serve": (10.0, 30.0, 18.0), "engine": (20.0,)}
    done = [Throughput(way=way, round=1, tokens_per_s=one, ttft_s=0.1) for way, all_ in values.items() for one in all_]
    served, engine = throughput_summary(done)
    assert (served["way"], served["tokens_per_s"], served["of_engine"]) == ("serve", 18.0, pytest.approx(0.9))
    assert engine["of_engine"] == 1.0


def test_what_can_be_typed() -> None:
    done = CliRunner().invoke(app, ["front", "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    for option in ("--requests", "--streams", "--rounds", "--output-len", "--prompt-len", "--json-out"):
        assert option in done.output
