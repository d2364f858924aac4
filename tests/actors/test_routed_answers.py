"""`routed_experts` as a client gets it: vLLM's form, the experts that one process takes, whoever is lost meanwhile."""

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from actors.front.coordinator_client import CoordinatorClient
from actors.front.coordinator_pool import CoordinatorPool
from actors.front.http_app import create_app
from actors.front.routed_experts import RoutedShape
from model.dispatch import Answers, DispatchPlan
from protos.coordinator_pb2 import SequenceOutput, Submit
from tests.support.checkpoints import write_mixtral
from tests.support.engines import AsyncExperts, Later, TinyModel
from tests.support.front import MODEL, client_of, make_front, post, run, serving
from tests.support.routing import Ids, routed_alone
from tests.support.scripted_coordinator import ScriptedCoordinator, saying
from tests.support.served import CREDENTIALS, served
from tests.support.tiny_cluster import tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

SHAPE = RoutedShape(2, 4, 2)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("routed") / "tiny"
    write_mixtral(path)
    write_byte_tokenizer(path, 300)
    return path


@pytest.fixture(scope="module")
def model(model_dir: Path) -> TinyModel:
    return TinyModel.load(model_dir)


def read(text: str) -> Ids:
    """As clients of vLLM read it."""
    return np.asarray(np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False))


def check(model: TinyModel, choice: dict[str, Any], prompt_ids: list[int]) -> None:
    found = read(choice["routed_experts"])
    known = [*prompt_ids, *choice["token_ids"]]
    assert found.dtype == np.uint8
    assert found.shape == (len(known) - 1, 2, 2)
    assert np.array_equal(found, routed_alone(model, known[:-1]))


@asynccontextmanager
async def cluster(model_dir: Path, **config: Any) -> AsyncIterator[httpx2.AsyncClient]:
    async with (
        tiny_cluster(model_dir, enable_return_routed_experts=True, **config) as one,
        client_of(one.front) as client,
    ):
        await one.front.coordinators.connect()
        yield client
        await one.front.close()


def test_a_whole_cluster_says_what_one_process_takes(model_dir: Path, model: TinyModel) -> None:
    async def work() -> None:
        async with cluster(model_dir, max_num_batched_tokens=32, max_num_seqs=8, microbatches=2) as client:
            body = {"model": MODEL, "max_tokens": 9, "n": 3, "ignore_eos": True, "return_token_ids": True, "seed": 4}
            prompts = ["a prompt of some length that is cut into chunks", "b"]
            answer = (await client.post("/v1/completions", json={**body, "prompt": prompts})).json()
            assert len(answer["choices"]) == 6
            for choice in answer["choices"]:
                check(model, choice, choice["prompt_token_ids"])
            chat = {**body, "messages": [{"role": "user", "content": "hello"}]}
            answer = (await client.post("/v1/chat/completions", json=chat)).json()
            assert len({choice["routed_experts"] for choice in answer["choices"]}) > 1
            for choice in answer["choices"]:
                check(model, choice, answer["prompt_token_ids"])
            quiet = (
                await client.post("/v1/completions", json={**body, "prompt": "b", "return_routed_experts": False})
            ).json()
            assert "routed_experts" not in quiet["choices"][0]
            stream = await client.post("/v1/completions", json={**body, "prompt": "b", "stream": True})
            assert "routed_experts" not in stream.text

    run(work())


def test_the_official_client_reads_it(model_dir: Path, model: TinyModel) -> None:
    async def work() -> None:
        async with (
            tiny_cluster(model_dir, enable_return_routed_experts=True) as one,
            serving(create_app(one.front)) as url,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ):
            answer = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=4
            )
            extra = answer.choices[0].model_extra
            assert extra is not None
            assert answer.usage is not None
            assert read(extra["routed_experts"]).shape == (answer.usage.total_tokens - 1, 2, 2)

    run(work())


def test_a_stop_string_cuts_it_with_the_answer(model_dir: Path, model: TinyModel) -> None:
    """The coordinator may be further than the text: the shape is that of the tokens in the answer."""

    async def work() -> None:
        async with cluster(model_dir) as client:
            body = {"model": MODEL, "prompt": "p", "max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
            whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]
            stop = whole["text"][3:5]
            cut = (
                await client.post("/v1/completions", json={**body, "stop": stop, "seed": 1, "temperature": 0})
            ).json()
            check(model, cut["choices"][0], cut["choices"][0]["prompt_token_ids"])

    run(work())


class PacedExperts:
    """Experts that let a step begin for each that they are told of: no two tokens come in one output."""

    def __init__(self, inner: AsyncExperts) -> None:
        self.steps = asyncio.Semaphore(0)
        self._inner = inner

    def start(self, layer: int, plan: DispatchPlan, deadline_s: float | None = None) -> Later:
        return Later(self._run(layer, plan))

    async def _run(self, layer: int, plan: DispatchPlan) -> Answers:
        if layer == 0:
            await self.steps.acquire()
        return await self._inner.start(layer, plan).result()


class Losing:
    """A client whose coordinator is lost after so many outputs of a request; each is read before the next is made."""

    def __init__(self, inner: CoordinatorClient, after: int, experts: PacedExperts) -> None:
        self._inner = inner
        self._after = after
        self._experts = experts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def generate(self, submit: Submit) -> AsyncIterator[SequenceOutput]:
        left = self._after
        stream = self._inner.generate(submit)
        self._experts.steps = asyncio.Semaphore(1)
        try:
            async for output in stream:
                yield output
                self._experts.steps.release()
                left -= 1
                if not left:
                    self._inner._lose("lost on purpose")
                    self._inner._connected.set()
        finally:
            await stream.aclose()


@pytest.mark.parametrize("after", [1, 2, 5])
def test_going_on_at_another_coordinator(model_dir: Path, model: TinyModel, after: int) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            clients: list[Any] = []
            for _ in range(2):
                experts = PacedExperts(model.experts)
                one = await stack.enter_async_context(served(model, routed_experts=True, experts=experts))
                clients.append(Losing(CoordinatorClient(one.address, CREDENTIALS), after, experts))
            pool = CoordinatorPool(clients)
            front = make_front(model_dir, coordinators=pool, routed_shape=SHAPE)
            async with client_of(front) as client:
                await pool.connect()
                body = {"model": MODEL, "prompt": "some prompt", "max_tokens": 12, "ignore_eos": True}
                answer = (await client.post("/v1/completions", json={**body, "return_token_ids": True})).json()
                (choice,) = answer["choices"]
                assert len(choice["token_ids"]) == 12
                check(model, choice, choice["prompt_token_ids"])
                assert sum(pool.resubmissions.values()) >= 1
            await front.close()

    run(work())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_cannot_be_had_is_refused(model_dir: Path, path: str) -> None:
    said = {"prompt": "p"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "p"}]}
    off, on = (
        make_front(model_dir, ScriptedCoordinator(saying([7]))),
        make_front(model_dir, ScriptedCoordinator(saying([7])), routed_shape=SHAPE),
    )
    for front, more in ((off, {}), (on, {"stream": True})):
        answer = post(front, path, return_routed_experts=True, **said, **more)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "return_routed_experts"
    assert "routed_experts" not in post(off, path, max_tokens=1, **said).json()["choices"][0]


def test_rows_that_cannot_be_are_an_error_and_not_an_answer() -> None:
    row = bytes(4)
    assert read(SHAPE.encode([row] * 9, 3, 4) or "").shape == (6, 2, 2)
    assert read(SHAPE.encode([row] * 3, 3, 0) or "").shape == (3, 2, 2)
    assert SHAPE.encode([], 3, 4) is None
    with pytest.raises(ValueError, match="5 positions came with experts, but the answer has 6"):
        SHAPE.encode([row] * 5, 3, 4)
    with pytest.raises(ValueError, match="reshape"):
        SHAPE.encode([row[:3]] * 6, 3, 4)
    assert read(RoutedShape(1, 300, 1).encode([b"\x2b\x01"], 1, 1) or "").tolist() == [[[299]]]
