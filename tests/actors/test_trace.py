"""Listening to which experts live traffic takes: complete, bounded, closed to strangers; it never says a token."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from actors.channels import WireCredentials, open_channel
from actors.coordinator.trace_tap import MAX_CHUNK_BYTES, MAX_LISTENERS, TooManyListeners, TraceTap
from cluster.prompt_lookup import PromptLookupConfig
from protos.coordinator_pb2 import SnapshotRequest, TraceChunk, TraceRequest
from protos.coordinator_pb2_grpc import CoordinatorServiceStub
from tests.support.checkpoints import write_mixtral
from tests.support.engines import GatedExperts, TinyModel
from tests.support.routing import Ids, routed_alone
from tests.support.served import CLOSED, CREDENTIALS, RawStream, raw_stream, served, submit
from tests.support.tiny_cluster import TOKEN, tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

pytestmark = pytest.mark.anyio

SHAPE = (2, 4, 2)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path: Path = tmp_path_factory.mktemp("traced") / "tiny"
    write_mixtral(path)
    write_byte_tokenizer(path, 300)
    return TinyModel.load(path)


class Heard:
    """What one listener was told, by sequence."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.chunks: list[TraceChunk] = []
        self.rows: dict[int, dict[int, bytes]] = {}
        self.prompts: dict[int, int] = {}
        self.outputs: dict[int, int] = {}

    async def read(self) -> TraceChunk:
        async with asyncio.timeout(120):
            chunk = await self.call.read()
        assert isinstance(chunk, TraceChunk), "the stream has ended"
        self.chunks.append(chunk)
        self.prompts |= {one.sequence: one.prompt_tokens for one in chunk.arrivals}
        self.outputs |= {one.sequence: one.output_tokens for one in chunk.ends}
        for step in chunk.steps:
            sequences = np.frombuffer(step.sequences, "<u8").tolist()
            positions = np.frombuffer(step.positions, "<u4").tolist()
            size = chunk.num_layers * chunk.top_k
            assert len(step.experts) == size * len(sequences)
            for at, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
                told = self.rows.setdefault(sequence, {})
                assert position not in told, "each position once"
                told[position] = step.experts[at * size : (at + 1) * size]
        return chunk

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await self.read()

    def ids(self, sequence: int) -> Ids:
        told = self.rows[sequence]
        assert list(told) == list(range(min(told), min(told) + len(told))), "in order, nothing missing"
        return np.frombuffer(b"".join(told.values()), np.uint8).reshape(len(told), 2, 2)


@asynccontextmanager
async def listening(address: str, credentials: WireCredentials = CREDENTIALS) -> AsyncIterator[Heard]:
    async with open_channel(address, credentials) as channel:
        heard = Heard(CoordinatorServiceStub(channel).Trace(TraceRequest()))  # type: ignore[no-untyped-call]
        yield heard
        heard.call.cancel()


async def until(holds: Callable[[], bool]) -> None:
    """Waits for what another task does soon; the loop turns meanwhile."""
    async with asyncio.timeout(120):
        while True:
            if holds():
                return
            await asyncio.sleep(0.005)


async def generate(stream: RawStream, **prompts: list[int]) -> dict[str, list[int]]:
    """The tokens of each, which are told in order of arrival."""
    numbers = {name: number for number, name in enumerate(prompts, 1)}
    await stream.send(*(submit(numbers[name], prompt, 8) for name, prompt in prompts.items()))
    await stream.read_until_done(*numbers.values())
    return {name: stream.tokens(number) for name, number in numbers.items()}


async def test_every_token_with_the_experts_that_one_process_takes(model: TinyModel) -> None:
    prompts = {"a": [5, 6, 7], "b": [9] * 70, "c": [11, 12]}
    async with served(model, chunk=32, max_num_seqs=8, microbatches=2) as one, listening(one.address) as heard:
        first = await heard.read()
        assert (first.num_layers, first.num_experts, first.top_k, first.coordinator_id) == (*SHAPE, "coordinator-0")
        assert len(first.steps) + len(first.arrivals) + len(first.ends) == 0
        async with raw_stream(one.address) as stream:
            tokens = await generate(stream, **prompts)
        await heard.until(lambda: len(heard.outputs) == 3)
    for sequence, (name, prompt) in enumerate(prompts.items()):
        assert heard.prompts[sequence] == len(prompt)
        assert heard.outputs[sequence] == 8
        assert np.array_equal(heard.ids(sequence), routed_alone(model, [*prompt, *tokens[name]][:-1]))


async def test_preempted_and_guessed_tokens_are_told_once_or_not_at_all(model: TinyModel) -> None:
    lookup = PromptLookupConfig(tokens=4, ngram_max=3, ngram_min=1, max_batch=4)
    prompts = {name: [token, token + 1] * 15 for name, token in (("a", 5), ("b", 30), ("c", 60))}
    settings: dict[str, Any] = {"num_blocks": 4, "max_model_len": 100, "prompt_lookup": lookup}
    async with served(model, **settings) as one, listening(one.address) as heard:
        await heard.read()
        async with raw_stream(one.address) as stream:
            await stream.send(*(submit(number, prompt, 40) for number, prompt in enumerate(prompts.values(), 1)))
            await stream.read_until_done(1, 2, 3)
            tokens = [stream.tokens(number) for number in (1, 2, 3)]
        await heard.until(lambda: len(heard.outputs) == 3)
        counters = one.engine.scheduler.counters
        assert counters.preemptions > 0
        assert counters.draft_tokens > 0
    for sequence, prompt in enumerate(prompts.values()):
        assert np.array_equal(heard.ids(sequence), routed_alone(model, [*prompt, *tokens[sequence]][:-1]))


async def test_who_comes_late_hears_what_comes_then(model: TinyModel) -> None:
    experts = GatedExperts(model.experts, shuts_after=10 * SHAPE[0])  # ten steps: it goes on when somebody listens
    async with served(model, experts=experts) as one, raw_stream(one.address) as stream:
        await stream.send(submit(1, [5, 6, 7], 200))
        while len(stream.tokens(1)) < 3:
            await stream.read()
        async with listening(one.address) as heard:
            await heard.read()
            experts.open()
            await heard.until(lambda: bool(heard.rows))
            assert heard.prompts == {}, "it did not arrive while somebody listened"
            await stream.read_until_done(1)
            await heard.until(lambda: bool(heard.outputs))
        first = min(heard.rows[0])
        assert first > 3
        expected = routed_alone(model, [5, 6, 7, *stream.tokens(1)][:-1])
        assert np.array_equal(heard.ids(0), expected[first:])


async def test_one_that_goes_on_from_elsewhere_has_not_arrived_here(model: TinyModel) -> None:
    async with served(model) as one, listening(one.address) as heard, raw_stream(one.address) as stream:
        await heard.read()
        await stream.send(submit(1, [5, 6, 7], 8))
        await stream.read_until_done(1)
        tokens = stream.tokens(1)
        await stream.send(submit(2, [5, 6, 7], 8, generated_token_ids=tokens[:3]))
        await stream.read_until_done(2)
        await heard.until(lambda: len(heard.outputs) == 2)
    assert heard.prompts == {0: 3}
    assert min(heard.rows[1]) == 3 + 3 - 1, "what was computed there was told there"
    assert np.array_equal(heard.ids(1), heard.ids(0)[5:])


async def test_strangers_hear_nothing(model: TinyModel) -> None:
    async with served(model) as one, listening(one.address, WireCredentials("a-token-of-somebody-else")) as heard:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await heard.read()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert one.engine.routing.tap.num_listeners == 0


async def test_few_may_listen_and_who_leaves_makes_room(model: TinyModel) -> None:
    async with served(model) as one:
        stub: Any
        async with open_channel(one.address, CREDENTIALS) as channel:
            stub = CoordinatorServiceStub(channel)  # type: ignore[no-untyped-call]
            calls = [stub.Trace(TraceRequest()) for _ in range(MAX_LISTENERS)]
            for call in calls:
                await call.read()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Trace(TraceRequest()).read()
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert one.engine.routing.tap.num_listeners == MAX_LISTENERS
            calls[0].cancel()
            await until(lambda: one.engine.routing.tap.num_listeners < MAX_LISTENERS)
            await stub.Trace(TraceRequest()).read()


async def test_the_end_of_a_coordinator_ends_the_stream_with_all_that_was_recorded(model: TinyModel) -> None:
    async with served(model) as one, listening(one.address) as heard, raw_stream(one.address) as stream:
        await heard.read()
        await generate(stream, a=[5, 6, 7])
        one.service.end_streams()
        with pytest.raises(AssertionError, match="the stream has ended"):
            await heard.until(lambda: False)
        assert heard.outputs == {0: 8}


async def test_a_coordinator_that_loads_says_so(model: TinyModel) -> None:
    async with served(model) as one, listening(one.address) as heard:
        one.service._engine = None
        one.service.close(CLOSED)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await heard.read()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_snapshots_count_what_was_recorded(model: TinyModel) -> None:
    async with tiny_cluster(model.path) as cluster, listening(cluster.address, WireCredentials(TOKEN)) as heard:
        await heard.read()
        await cluster.client.connect()
        async for _ in cluster.client.generate(submit(1, [5, 6, 7], 8)):
            pass
        now = await cluster.snapshot()
        assert (now.trace_listeners, now.trace_tokens_total, now.trace_dropped_tokens_total) == (1, 3 + 8 - 1, 0)
        assert (await CoordinatorServiceStub(cluster.client._channel).Snapshot(SnapshotRequest())).trace_listeners == 1  # type: ignore[no-untyped-call]


def step(tap: TraceTap, tokens: int, row: int = 4) -> None:
    tap.took(bytes(8 * tokens), bytes(4 * tokens), bytes(row * tokens), tokens)


async def test_who_reads_too_slowly_loses_the_newest_and_is_told_how_much() -> None:
    tap = TraceTap(SHAPE, wall_clock=lambda: 5.0)
    slow, quick = tap.listen(max_pending_bytes=1000), tap.listen()
    for _ in range(10):
        step(tap, 10)
        quick.take("c")
    assert slow.dropped_tokens == 50
    assert quick.dropped_tokens == 0
    assert (tap.tokens_total, tap.dropped_total) == (100, 50)
    chunk = slow.take("c")
    assert len(chunk.steps) == 5
    assert chunk.dropped_tokens == 50
    assert chunk.steps[0].time_unix_us == 5_000_000
    step(tap, 10)
    assert len(slow.take("c").steps) == 1, "there is room again"


async def test_chunks_are_bounded_and_in_order() -> None:
    tap = TraceTap(SHAPE)
    listener = tap.listen()
    for number in range(300):
        tap.arrived(number, 7)
        step(tap, 1000)
        tap.ended(number, 1)
    steps = 0
    while len((chunk := listener.take("c")).steps):
        assert chunk.ByteSize() <= MAX_CHUNK_BYTES + 17_000
        steps += len(chunk.steps)
        assert len(chunk.ends) <= steps
    assert steps == 300
    assert not listener.filled.is_set()


async def test_nobody_listens_for_ever_or_without_end() -> None:
    tap = TraceTap(SHAPE)
    assert not tap.listening
    listeners = [tap.listen() for _ in range(MAX_LISTENERS)]
    with pytest.raises(TooManyListeners, match="4 listen already"):
        tap.listen()
    tap.leave(listeners[0])
    tap.leave(listeners[0])
    assert tap.num_listeners == MAX_LISTENERS - 1
    step(tap, 1)
    tap.close()
    assert not listeners[1].done
    listeners[1].take("c")
    assert listeners[1].done
    assert listeners[1].filled.is_set(), "nobody waits for what will never come"
