"""The two fronts, HTTP and gRPC, hold a request to the same rules and give the same tokens; and what a client's own
stream may do."""

import asyncio
import math
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest

from actors.channels import WireCredentials
from actors.coordinator.service import MAX_CLIENT_REQUESTS, MAX_CLIENT_STREAMS
from actors.front.http_app import create_app
from protos.coordinator_pb2 import Cancel, PublishMapRequest, Sampling, SequenceOutput, SnapshotRequest, Submit
from protos.expert_pb2 import STATUS_INVALID, STATUS_OK, STATUS_OVERLOADED, DrainRequest
from tests.support.checkpoints import write_mixtral
from tests.support.expert_process import ROOT
from tests.support.front import run
from tests.support.held_steps import hold_steps
from tests.support.served import RawStream
from tests.support.tiny_cluster import TinyCluster, tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

CLIENT_TOKEN = "the-token-of-client-alpha"
CONTEXT = 512
VOCAB = 300
BASE: dict[str, Any] = {"prompt": [5, 6, 7, 8], "max_tokens": 6, "ignore_eos": True, "temperature": 0, "seed": 3}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fronts")
    write_mixtral(path, layers=1, experts=2)
    write_byte_tokenizer(path, VOCAB)
    return path


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "clients"
    path.write_text(f"alpha {CLIENT_TOKEN}\n")
    return path


@asynccontextmanager
async def as_client(cluster: TinyCluster) -> AsyncIterator[RawStream]:
    stream = RawStream(cluster.address, WireCredentials(CLIENT_TOKEN))
    try:
        yield stream
    finally:
        await stream.close()


async def _to_the_end(call: Any) -> None:
    """Reads what comes until nothing does. Raises AioRpcError."""
    while await call.read() is not grpc.aio.EOF:
        pass


async def _ask_much(call: Any) -> None:
    """Raises AioRpcError at the end of the call; InvalidStateError where a write comes after it."""
    for n in range(3, 60):
        await call.write(_wrapped(submit_of(n, {"max_tokens": 500})))
    await _to_the_end(call)


def in_cluster(model_dir: Path, token_file: Path, use: Callable[[TinyCluster], Awaitable[None]]) -> None:
    settings = {"grpc_client_token_file": str(token_file), "max_model_len": CONTEXT, "max_queue_wait_s": 600.0}

    async def work() -> None:
        async with tiny_cluster(model_dir, **settings) as cluster:
            await use(cluster)

    run(work(), timeout_s=240)


# --- parity ---

GOOD: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 11},
    "min_p": {"temperature": 1.5, "min_p": 0.05, "seed": 2**64 - 1},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.5, "temperature": 1},
    "logprobs": {"logprobs": 5},
    "chosen only": {"logprobs": 0, "temperature": 0.7},
    "most logprobs": {"logprobs": 20, "max_tokens": 2},
    "stop token": {"stop_token_ids": list(range(40, 100)), "max_tokens": 30},
    "min_tokens": {"stop_token_ids": list(range(60)), "min_tokens": 5, "max_tokens": 30},
    "one token": {"prompt": [0], "max_tokens": 1},
    "last id": {"prompt": [VOCAB - 1]},
    "full context": {"prompt": [9] * (CONTEXT - 2), "max_tokens": 2},
    "eos counts": {"ignore_eos": False, "max_tokens": 40, "temperature": 1.0, "seed": 5},
}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "token beyond": ({"prompt": [5, VOCAB]}, "prompt_token_ids[1]"),
    "token far beyond": ({"prompt": [2**32 - 1]}, "prompt_token_ids[0]"),
    "prompt too long": ({"prompt": [9] * CONTEXT, "max_tokens": 1}, "prompt_token_ids"),
    "output too long": ({"max_tokens": CONTEXT - 3}, "max_tokens"),
    "output far too long": ({"max_tokens": 2**32 - 1}, "max_tokens"),
    "min over max": ({"min_tokens": 7}, "min_tokens"),
    "stop beyond": ({"stop_token_ids": [1, VOCAB]}, "stop_token_ids[1]"),
    "too many stops": ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
    "too many logprobs": ({"logprobs": 21}, "logprobs"),
    "temperature": ({"temperature": -0.5}, "sampling.temperature"),
    "temperature too hot": ({"temperature": 2.5}, "sampling.temperature"),
    "top_p": ({"top_p": 1.5}, "sampling.top_p"),
    "min_p": ({"min_p": -0.5}, "sampling.min_p"),
    "repetition": ({"repetition_penalty": 0.001}, "sampling.repetition_penalty"),
    "repetition too much": ({"repetition_penalty": 11}, "sampling.repetition_penalty"),
    "presence": ({"presence_penalty": 2.5}, "sampling.presence_penalty"),
    "frequency": ({"frequency_penalty": -2.5}, "sampling.frequency_penalty"),
}


def submit_of(request_id: int, body: dict[str, Any]) -> Submit:
    """What a client that has token ids says for the same request."""
    given = dict(BASE, **body)
    return Submit(
        request_id=request_id,
        prompt_token_ids=given["prompt"],
        max_tokens=given["max_tokens"],
        min_tokens=given.get("min_tokens", 0),
        stop_token_ids=given.get("stop_token_ids", ()),
        ignore_eos=given["ignore_eos"],
        logprobs=given.get("logprobs"),
        sampling=Sampling(
            temperature=given["temperature"],
            top_p=given.get("top_p", 1.0),
            top_k=given.get("top_k", 0),
            min_p=given.get("min_p", 0.0),
            seed=given["seed"],
            repetition_penalty=given.get("repetition_penalty", 1.0),
            presence_penalty=given.get("presence_penalty", 0.0),
            frequency_penalty=given.get("frequency_penalty", 0.0),
        ),
    )


@dataclass
class Said:
    """What one front said: of a refusal the field, of an answer its tokens and the chosen ones' log-probabilities."""

    refused: str | None
    tokens: list[int]
    logprobs: list[float] | None


async def by_http(client: httpx2.AsyncClient, body: dict[str, Any]) -> Said:
    response = await client.post("/v1/completions", json={"model": "tiny", "return_token_ids": True, **BASE, **body})
    if response.status_code == 400:
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        return Said(str(error["param"]), [], None)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    told = choice["logprobs"]
    return Said(None, choice["token_ids"], None if told is None else told["token_logprobs"])


async def by_grpc(stream: RawStream, request_id: int, body: dict[str, Any]) -> Said:
    await stream.send(submit_of(request_id, body))
    await stream.read_until_done(request_id)
    last = stream.last(request_id)
    assert last is not None
    if last.status != STATUS_OK:
        assert (last.status, last.error.startswith(last.error_field)) == (STATUS_INVALID, True)
        return Said(last.error_field, [], None)
    told = [place.chosen.logprob for one in stream.told[request_id] for place in one.logprobs]
    return Said(None, stream.tokens(request_id), told if "logprobs" in body else None)


def test_both_fronts_accept_and_refuse_the_same_and_say_the_same(model_dir: Path, token_file: Path) -> None:
    http_names = {"prompt_token_ids": "prompt", "sampling": ""}

    async def use(cluster: TinyCluster) -> None:
        transport = httpx2.ASGITransport(app=create_app(cluster.front))
        async with (
            httpx2.AsyncClient(transport=transport, base_url="http://octavo") as client,
            as_client(cluster) as one,
        ):
            for request_id, (name, body) in enumerate(GOOD.items(), 1):
                http, direct = await by_http(client, body), await by_grpc(one, request_id, body)
                assert http == direct, name
                assert http.refused is None, name
                assert http.tokens, name
            for request_id, (name, (body, field)) in enumerate(BAD.items(), 100):
                http, direct = await by_http(client, body), await by_grpc(one, request_id, body)
                assert direct.refused == field, name
                head = field.split(".")[0].split("[")[0]
                expected = http_names.get(head, field) or field.split(".")[1]
                if head in ("max_tokens",):  # OpenAI names the prompt where both together are too long
                    expected = "prompt"
                assert http.refused == expected, name

    in_cluster(model_dir, token_file, use)


def test_only_grpc_can_write_numbers_that_are_none(model_dir: Path, token_file: Path) -> None:
    async def use(cluster: TinyCluster) -> None:
        async with as_client(cluster) as stream:
            for request_id, value in enumerate((math.nan, math.inf, -math.inf), 1):
                wrong = submit_of(request_id, {})
                wrong.sampling.temperature = value
                await stream.send(wrong)
            await stream.read_until_done(1, 2, 3)
            assert [stream.last(n).error_field for n in (1, 2, 3)] == ["sampling.temperature"] * 3  # type: ignore[union-attr]

    in_cluster(model_dir, token_file, use)


# --- a client's own stream ---


def test_a_client_has_so_many_requests_and_streams_and_no_more(model_dir: Path, token_file: Path) -> None:
    async def use(cluster: TinyCluster) -> None:
        async with as_client(cluster) as stream:
            await by_grpc(stream, 1000, {})  # from here on it is known how long others would wait
            gate = hold_steps(cluster.coordinator._engine)  # nobody is done before all have asked
            many = range(1, MAX_CLIENT_REQUESTS + 2)
            await stream.send(*(submit_of(n, {"max_tokens": 400}) for n in many))
            refused: list[SequenceOutput] = []
            while not refused:
                refused = [one for one in await stream.read() if one.status == STATUS_OVERLOADED]
            assert refused[0].request_id == MAX_CLIENT_REQUESTS + 1
            assert refused[0].error == f"{MAX_CLIENT_REQUESTS} requests are open on this stream"
            assert refused[0].retry_after_ms > 0
            others = [RawStream(cluster.address, WireCredentials(CLIENT_TOKEN)) for _ in range(MAX_CLIENT_STREAMS - 1)]
            for other in others:
                await other.call.initial_metadata()
            one_more = RawStream(cluster.address, WireCredentials(CLIENT_TOKEN))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await one_more.read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "alpha has 16 streams" in str(caught.value.details())
            await one_more.close()
            for other in others:
                await other.close()
        gate.set()
        await cluster.until(lambda now: now.num_running == 0 and now.num_waiting == 0)  # gone with their stream
        async with as_client(cluster) as again:
            assert (await by_grpc(again, 1, {})).tokens, "places are given back"

    in_cluster(model_dir, token_file, use)


def test_a_client_opens_nothing_else(model_dir: Path, token_file: Path) -> None:
    async def use(cluster: TinyCluster) -> None:
        async with as_client(cluster) as stream:
            calls = (
                stream.stub.PublishMap(PublishMapRequest()),
                stream.stub.Snapshot(SnapshotRequest()),
                stream.stub.Drain(DrainRequest()),
            )
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert (await by_grpc(stream, 1, {})).tokens
        assert (await cluster.snapshot()).state == "ready"

    in_cluster(model_dir, token_file, use)


def test_a_request_ends_by_its_deadline_by_cancel_and_with_the_calls_own_deadline(
    model_dir: Path, token_file: Path
) -> None:
    async def use(cluster: TinyCluster) -> None:
        async with as_client(cluster) as stream:
            gate = hold_steps(cluster.coordinator._engine)  # none of them is done before it is ended
            late = submit_of(1, {"max_tokens": 500})
            late.deadline_unix_us = 1
            await stream.send(late, submit_of(2, {"max_tokens": 500}), Cancel(request_id=2))
            await stream.read_until_done(1, 2)
            assert "deadline" in stream.last(1).error  # type: ignore[union-attr]
            assert len(stream.tokens(2)) < 500
            short = stream.stub.Generate(timeout=5.0)
            with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)):
                await _ask_much(short)
            gate.set()
            assert await short.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await cluster.until(lambda now: now.num_running == 0 and now.num_waiting == 0)

    in_cluster(model_dir, token_file, use)


@pytest.mark.parametrize("data", [b"\xff" * 10, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a" * (4 << 20)], ids=len)
def test_what_is_no_message_ends_its_stream_and_no_other(model_dir: Path, token_file: Path, data: bytes) -> None:
    async def use(cluster: TinyCluster) -> None:
        async with as_client(cluster) as good, as_client(cluster) as bad:
            await good.send(submit_of(1, {"max_tokens": 60}))
            raw = bad._channel.stream_stream("/octavo.CoordinatorService/Generate")()
            await raw.write(data)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _to_the_end(raw)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert ("larger than a valid one's" in str(caught.value.details())) == (len(data) > 1 << 20)
            await good.read_until_done(1)
            assert len(good.tokens(1)) == 60

    in_cluster(model_dir, token_file, use)


def _wrapped(submit: Submit) -> Any:
    from protos.coordinator_pb2 import GenerateRequest

    return GenerateRequest(submit=submit)


# The client that the README shows.
CLIENT = """
import queue, sys
import grpc
from protos.coordinator_pb2 import GenerateRequest, Sampling, Submit
from protos.coordinator_pb2_grpc import CoordinatorServiceStub

address, token = sys.argv[1:]
sampling = Sampling(temperature=0, top_p=1, repetition_penalty=1, seed=1)
submit = Submit(request_id=1, prompt_token_ids=[5, 6, 7, 8], max_tokens=6, ignore_eos=True, sampling=sampling)
requests = queue.SimpleQueue()  # the sending side stays open: a stream that is closed ends what it asked for
requests.put(GenerateRequest(submit=submit))
with grpc.insecure_channel(address) as channel:
    header = [("authorization", f"Bearer {token}")]
    for reply in CoordinatorServiceStub(channel).Generate(iter(requests.get, None), metadata=header, timeout=200):
        for output in reply.outputs:
            print(*output.token_ids, output.error)
            if output.finish_reason:
                requests.put(None)
"""


def test_the_readmes_client_works(model_dir: Path, token_file: Path) -> None:
    async def use(cluster: TinyCluster) -> None:
        async with as_client(cluster) as stream:
            expected = (await by_grpc(stream, 1, {})).tokens
        command = [sys.executable, "-c", textwrap.dedent(CLIENT), cluster.address, CLIENT_TOKEN]
        done = await asyncio.to_thread(
            subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr
        assert [int(word) for word in done.stdout.split()] == expected

    in_cluster(model_dir, token_file, use)
