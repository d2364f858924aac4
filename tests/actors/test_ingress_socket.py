"""The routes over real sockets: the official client, and clients that leave in the middle."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from actors.front.front_door import FrontDoor
from actors.front.http_app import create_app
from actors.front.streaming import ClientGone, unless_gone
from model.text.tokenizer import load_tokenizer
from protos.expert_pb2 import STATUS_INTERNAL, STATUS_OVERLOADED
from tests.support.front import MODEL, VOCAB, make_front, run, serving
from tests.support.scripted_coordinator import ScriptedCoordinator, failing, saying
from tests.support.tokenizers import EOS_ID, write_byte_tokenizer

SAID = "Hello, 世界! 😀"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path, VOCAB)
    return path


def speaker(model_dir: Path, **more: Any) -> ScriptedCoordinator:
    return ScriptedCoordinator(saying(load_tokenizer(model_dir).encode(SAID, add_bos=False), EOS_ID), **more)


@asynccontextmanager
async def official(front: FrontDoor) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client against the application on a real port; it does not retry."""
    async with serving(create_app(front)) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        async with client:
            yield client


def with_client(front: FrontDoor, use: Callable[[openai.AsyncOpenAI], Awaitable[None]]) -> None:
    async def work() -> None:
        async with official(front) as client:
            await use(client)

    run(work())


def test_the_official_client_reads_request_ids_scores_and_refusals(model_dir: Path) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        messages: Any = [{"role": "user", "content": "hi"}]
        chat = await client.chat.completions.create(
            model=MODEL,
            messages=messages,
            logprobs=True,
            top_logprobs=2,
            logit_bias={"70": -100, "71": 5},
            user="someone",
            extra_headers={"X-Request-Id": "call-7"},
            extra_body={"prompt_logprobs": 0, "bad_words": ["no"], "priority": 3},
        )
        assert (chat.id, chat._request_id) == ("chatcmpl-call-7", "call-7")
        scores = chat.choices[0].logprobs
        assert scores is not None
        assert scores.content is not None
        said = b"".join(bytes(token.bytes or ()) for token in scores.content)
        assert said.decode() == chat.choices[0].message.content == SAID
        assert {len(token.top_logprobs) for token in scores.content} == {2}
        assert (chat.model_extra or {})["prompt_logprobs"][0] is None
        text = await client.completions.create(model=MODEL, prompt="p", logprobs=1, echo=True, max_tokens=3)
        assert text._request_id is not None
        assert text.id == f"cmpl-{text._request_id}"
        assert text.choices[0].logprobs is not None
        assert text.choices[0].logprobs.token_logprobs is not None
        assert len(text.choices[0].logprobs.token_logprobs) == 2 + 3
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.chat.completions.create(model=MODEL, messages=messages, logit_bias={"70": 101})
        assert (wrong.value.param, wrong.value.code, wrong.value.type) == (
            "logit_bias",
            "invalid_value",
            "invalid_request_error",
        )
        assert wrong.value.request_id is not None
        model = await client.models.retrieve(MODEL)
        assert (model.id, model.object) == (MODEL, "model")
        assert [one.id async for one in client.models.list()] == [MODEL]

    with_client(make_front(model_dir, speaker(model_dir)), use)


def test_chat_with_the_official_client(model_dir: Path) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], n=2, logprobs=True, top_logprobs=1, seed=5
        )
        assert [choice.message.content for choice in answer.choices] == [SAID, SAID]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.system_fingerprint == "fp_test"
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        logprobs = answer.choices[1].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert b"".join(bytes(token.bytes or ()) for token in logprobs.content).decode() == SAID

    with_client(make_front(model_dir, speaker(model_dir)), use)


def test_a_chat_stream_with_the_official_client(model_dir: Path) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SAID
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens > 5

    with_client(make_front(model_dir, speaker(model_dir)), use)


def test_completions_with_the_official_client(model_dir: Path) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        whole = await client.completions.create(model=MODEL, prompt="p", max_tokens=60, logprobs=1, echo=True)
        assert whole.choices[0].text == "p" + SAID
        assert whole.choices[0].logprobs is not None
        assert whole.choices[0].logprobs.token_logprobs is not None
        assert whole.choices[0].logprobs.token_logprobs[:2] == [None, -0.5]
        stream = await client.completions.create(model=MODEL, prompt=[[7, 8]], max_tokens=60, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == SAID
        models = await client.models.list()
        assert [model.id for model in models.data] == [MODEL]
        assert (await client.models.retrieve(MODEL)).owned_by == "octavo"

    with_client(make_front(model_dir, speaker(model_dir)), use)


def test_the_official_client_knows_our_errors(model_dir: Path) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model=MODEL, prompt="p", temperature=9)
        assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="other", prompt="p")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.RateLimitError) as full:
            await client.completions.create(model=MODEL, prompt="p", stream=True)
        assert full.value.response.headers["retry-after"] == "3"

    with_client(make_front(model_dir, ScriptedCoordinator(failing(STATUS_OVERLOADED, "", retry_after_ms=3000))), use)


def test_the_official_client_sees_an_error_in_mid_stream(model_dir: Path) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        stream = await client.completions.create(model=MODEL, prompt="p", stream=True)
        assert [(await anext(stream)).choices[0].text for _ in range(2)] == ["A", "B"]
        with pytest.raises(openai.APIError, match="had an error"):
            await anext(stream)

    ids = load_tokenizer(model_dir).encode("AB", add_bos=False)
    with_client(make_front(model_dir, ScriptedCoordinator(failing(STATUS_INTERNAL, "", after=ids))), use)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_after", [0, 2])
def test_a_client_that_leaves_cancels_its_request(model_dir: Path, stream: bool, hold_after: int) -> None:
    """While the coordinator says nothing at all: noticing must not wait for the next token."""
    coordinator = speaker(model_dir, hold_after=hold_after)
    front = make_front(model_dir, coordinator)

    async def work() -> None:
        async with serving(create_app(front)) as url, httpx2.AsyncClient(timeout=120) as client:
            body = {"model": MODEL, "prompt": "p", "stream": stream, "n": 3}
            asking = asyncio.create_task(client.post(f"{url}/v1/completions", json=body))
            await coordinator.held.wait()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await coordinator.idle.wait()
        assert sorted(coordinator.cancelled) == [submit.request_id for submit in coordinator.submits]
        assert len(coordinator.submits) == 3

    run(work())
    text = front.metrics.render().decode()
    assert "octavo_client_disconnects_total 1.0" in text
    assert "octavo_http_requests_inflight 0.0" in text


def test_the_work_goes_on_while_the_client_stays() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def result() -> int:
        await asyncio.sleep(0)
        return 5

    async def defect() -> int:
        raise KeyError("defect")

    async def work() -> None:
        assert await unless_gone(receive, result()) == 5
        with pytest.raises(KeyError):
            await unless_gone(receive, defect())

    run(work())


def test_the_work_is_cancelled_and_waited_for_when_the_client_leaves() -> None:
    messages = [{"type": "http.request"}, {"type": "http.disconnect"}]
    tidied = False

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def endless() -> None:
        nonlocal tidied
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            tidied = True

    async def work() -> None:
        with pytest.raises(ClientGone):
            await unless_gone(receive, endless())

    run(work())
    assert tidied
