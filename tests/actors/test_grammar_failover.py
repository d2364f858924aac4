"""Coordinators lost under answers that follow grammars: the same tokens, to the grammar's end."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.coordinator.grammars import Grammars
from actors.front.coordinator_client import CoordinatorClient
from actors.front.coordinator_pool import CoordinatorPool
from actors.front.resubmission import Verdict
from protos.coordinator_pb2 import FINISH_REASON_STOP, GRAMMAR_KIND_REGEX, Grammar, Sampling, SequenceOutput, Submit
from tests.support.checkpoints import write_mixtral
from tests.support.engines import GatedExperts, TinyModel
from tests.support.grammars import byte_vocabulary, text_of
from tests.support.served import CREDENTIALS, Served, served, submit
from tests.support.tokenizers import EOS_ID

pytestmark = pytest.mark.anyio

PATTERN = r"([a-f]{3} ){20}end"
COUNT = 8
FREE_STEPS = 30
"""Of two layers each: everybody has some tokens by then, and nobody all of them."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path: Path = tmp_path_factory.mktemp("failover")
    write_mixtral(path)
    return TinyModel.load(path)


@asynccontextmanager
async def coordinator(model: TinyModel, experts: GatedExperts) -> AsyncIterator[Served]:
    grammars = Grammars(byte_vocabulary())
    settings: dict[str, Any] = {"grammars": grammars, "eos_token_ids": [EOS_ID], "experts": experts}
    try:
        async with served(model, max_num_seqs=16, **settings) as server:
            yield server
    finally:
        grammars.close()


def request(number: int) -> Submit:
    sampling = Sampling(temperature=0.8 * (number % 2), top_p=1.0, repetition_penalty=1.0, seed=number)
    grammar = Grammar(kind=GRAMMAR_KIND_REGEX, text=PATTERN)
    return submit(number, [5 + number, 6, 7], 200, sampling=sampling, ignore_eos=False, grammar=grammar)


class Reader:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.last = SequenceOutput()
        self.some = asyncio.Event()

    async def read(self, pool: CoordinatorPool, asked: Submit) -> None:
        async with aclosing(pool.generate(asked)) as outputs:
            async for output in outputs:
                self.tokens += output.token_ids
                self.last = output
                if len(self.tokens) >= 5:
                    self.some.set()


async def told(model: TinyModel, num_coordinators: int, *, kill_one: bool) -> list[list[int]]:
    async with AsyncExitStack() as stack:
        gates = [GatedExperts(model.experts) for _ in range(num_coordinators)]
        servers = [await stack.enter_async_context(coordinator(model, experts)) for experts in gates]
        pool = CoordinatorPool([CoordinatorClient(one.address, CREDENTIALS) for one in servers])
        stack.push_async_callback(pool.close)
        await pool.connect()
        for experts in gates:
            experts.gate.clear()
        readers = [Reader() for _ in range(COUNT)]
        tasks = [asyncio.create_task(reader.read(pool, request(place))) for place, reader in enumerate(readers)]
        # Each coordinator takes its own time to compile the grammar: nobody begins before all can.
        while sum(len(server.engine.live) for server in servers) < COUNT:  # noqa: ASYNC110 - nobody is told
            await asyncio.sleep(0.01)
        for experts in gates:
            experts.shuts_after = 2 * FREE_STEPS if kill_one else None
            experts.gate.set()
        if kill_one:
            await asyncio.gather(*(reader.some.wait() for reader in readers))
            assert not any(task.done() for task in tasks), "too late to hurt anybody"
            await servers[0].server.stop(0)
            for experts in gates:
                experts.open()
        async with asyncio.timeout(200):
            await asyncio.gather(*tasks)
        if kill_one:
            assert pool.resubmissions[Verdict.LOST] > 0
        for reader in readers:
            assert reader.last.finish_reason == FINISH_REASON_STOP, reader.last
        return [reader.tokens for reader in readers]


async def test_answers_go_on_in_their_grammar_at_another_coordinator(model: TinyModel) -> None:
    expected = await told(model, 1, kill_one=False)
    for tokens in expected:
        assert re.fullmatch(PATTERN, text_of(tokens[:-1]))
    assert await told(model, 2, kill_one=True) == expected
