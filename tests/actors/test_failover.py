"""Coordinators lost under streams, over real gRPC with real engines: the same tokens, none twice, none missing."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

import pytest

from actors.coordinator.engine_io import STOPPED, UNEXPLAINED, Failure
from actors.front.coordinator_client import CoordinatorClient
from actors.front.coordinator_pool import CoordinatorPool
from actors.front.follower import keep_following
from actors.front.resubmission import Verdict
from protos.coordinator_pb2 import FINISH_REASON_LENGTH, PositionLogprobs, Sampling, SequenceOutput, Submit
from tests.support.checkpoints import write_mixtral
from tests.support.engines import TinyModel
from tests.support.held_steps import hold_steps
from tests.support.served import CREDENTIALS, Served, served, submit

pytestmark = pytest.mark.anyio

NUM_TOKENS = 120
FREE_STEPS = 40
"""Everybody has some tokens by then, and nobody all of them."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path: Path = tmp_path_factory.mktemp("failover")
    write_mixtral(path, layers=2, experts=4)
    return TinyModel.load(path)


def crowd() -> list[Submit]:
    """Eight greedy requests and eight that draw, half of them with penalties; all with scores."""
    requests = []
    for number in range(16):
        drawn = number >= 8
        penalty = 0.3 if number % 2 else 0.0
        sampling = Sampling(
            temperature=0.8 if drawn else 0.0, top_p=0.9, repetition_penalty=1.0, seed=number, frequency_penalty=penalty
        )
        prompt = [5 + number, 6, 7 + number] * (1 + number)
        requests.append(submit(number, prompt, NUM_TOKENS, sampling=sampling, logprobs=1, prompt_logprobs=0))
    return requests


class Reader:
    """Reads one request to its end and keeps what came, token by token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[PositionLogprobs] = []
        self.scores: list[PositionLogprobs] = []
        self.last: SequenceOutput | None = None
        self.some = asyncio.Event()

    async def read(self, pool: CoordinatorPool, request: Submit) -> None:
        async with aclosing(pool.generate(request)) as outputs:
            async for output in outputs:
                self.tokens += output.token_ids
                self.logprobs += output.logprobs
                self.scores += output.prompt_logprobs
                self.last = output
                if len(self.tokens) >= 5:
                    self.some.set()

    @property
    def exact(self) -> tuple[list[int], list[bytes], list[bytes]]:
        return self.tokens, *([one.SerializeToString() for one in places] for places in (self.logprobs, self.scores))


async def read_all(pool: CoordinatorPool, *servers: Served, hurt: Callable[[], object] | None = None) -> list[Reader]:
    """All of the crowd at once; `hurt` is called when each has got some tokens, and `servers` have not computed all."""
    requests = crowd()
    gates = [hold_steps(one.engine, FREE_STEPS) for one in servers]
    readers = [Reader() for _ in requests]
    tasks = [asyncio.create_task(one.read(pool, request)) for one, request in zip(readers, requests, strict=True)]
    if hurt is not None:
        await asyncio.gather(*(reader.some.wait() for reader in readers))
        assert not any(task.done() for task in tasks), "too late to hurt anybody"
        result = hurt()
        if asyncio.iscoroutine(result):
            await result
    for gate in gates:
        gate.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 200)
    for reader in readers:
        assert reader.last is not None
        assert reader.last.finish_reason == FINISH_REASON_LENGTH, reader.last
    return readers


@asynccontextmanager
async def two_servers(model: TinyModel) -> AsyncIterator[tuple[Served, Served]]:
    async with served(model, max_num_seqs=16) as first, served(model, max_num_seqs=16) as second:
        yield first, second


@asynccontextmanager
async def pool_of(*servers: Served) -> AsyncIterator[CoordinatorPool]:
    pool = CoordinatorPool([CoordinatorClient(one.address, CREDENTIALS) for one in servers])
    await pool.connect()
    try:
        yield pool
    finally:
        await pool.close()


@pytest.fixture(scope="module")
async def expected(model: TinyModel) -> list[Reader]:
    """What the crowd is told when nothing breaks."""
    async with served(model, max_num_seqs=16) as one, pool_of(one) as pool:
        return await read_all(pool)


def same(readers: list[Reader], expected: list[Reader]) -> None:
    assert [reader.exact for reader in readers] == [reader.exact for reader in expected]


async def test_a_killed_coordinators_streams_go_on_at_the_other(model: TinyModel, expected: list[Reader]) -> None:
    async with two_servers(model) as (first, second), pool_of(first, second) as pool:
        readers = await read_all(pool, first, second, hurt=lambda: first.server.stop(0))
        same(readers, expected)
        assert pool.resubmissions == {Verdict.LOST: 8}, "half of them were there"


async def test_with_one_coordinator_streams_wait_for_the_new_process(model: TinyModel, expected: list[Reader]) -> None:
    """It has another address, which is found out by asking."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(served(model, max_num_seqs=16))
        servers = [first]

        async def look() -> dict[str, CoordinatorClient]:
            return {servers[-1].address: CoordinatorClient(servers[-1].address, CREDENTIALS)}

        async def replace() -> None:
            await first.server.stop(0)
            servers.append(await stack.enter_async_context(served(model, max_num_seqs=16)))

        async with pool_of(first) as pool:
            following = asyncio.create_task(keep_following(pool, look, 1))
            readers = await read_all(pool, first, hurt=replace)
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        assert servers[0].address != servers[1].address
        same(readers, expected)
        assert pool.resubmissions[Verdict.LOST] == 16


@pytest.mark.parametrize(
    ("failure", "verdict"), [(STOPPED, Verdict.LOST), (UNEXPLAINED, Verdict.FAILED)], ids=["stopped", "failed"]
)
async def test_sequences_that_a_coordinator_gives_up_go_on_elsewhere(
    model: TinyModel, expected: list[Reader], failure: Failure, verdict: Verdict
) -> None:
    async with two_servers(model) as (first, second), pool_of(first, second) as pool:
        readers = await read_all(pool, first, second, hurt=lambda: first.engine.fail_all(failure))
        same(readers, expected)
        assert pool.resubmissions == {verdict: 8}


async def test_a_crowd_finds_room_at_a_full_coordinator_in_time(model: TinyModel, expected: list[Reader]) -> None:
    """The other one runs two at a time and keeps few waiting: nobody who was promised an answer is refused."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(served(model, max_num_seqs=16))
        small = await stack.enter_async_context(served(model, max_num_seqs=2, max_waiting_requests=2))
        pool = await stack.enter_async_context(pool_of(first))

        async def swap() -> None:
            await pool.follow({small.address: CoordinatorClient(small.address, CREDENTIALS)})

        readers = await read_all(pool, first, hurt=swap)
        same(readers, expected)
        assert small.service.refused_total > 0, "it was never full"


async def test_a_request_that_is_closed_while_it_goes_on_frees_everything(model: TinyModel) -> None:
    async with two_servers(model) as (first, second), pool_of(first, second) as pool:
        for one in (first, second):
            hold_steps(one.engine, FREE_STEPS)  # nobody is done before it is hurt, and closed
        async with aclosing(pool.generate(submit(1, [5, 6], 400))) as outputs:
            await anext(outputs)
            mine, other = (first, second) if len(first.engine.live) else (second, first)
            await mine.server.stop(0)
            while not len(other.engine.live):
                await anext(outputs)
        await asyncio.wait_for(other.engine.live.wait_for_none(), 120)
