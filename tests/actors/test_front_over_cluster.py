"""The front door over a real cluster in one process: HTTP, gRPC and arithmetic together; transformers is the oracle."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
import transformers

from actors.front.http_app import create_app
from model.text.tokenizer import load_tokenizer
from tests.support.checkpoints import write_mixtral
from tests.support.front import run, serving
from tests.support.tiny_cluster import TinyCluster, tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

MODEL = "tiny"
PROMPT = "The quick brown fox"
Use = Callable[[TinyCluster, openai.AsyncOpenAI], Awaitable[None]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral with a tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    write_mixtral(path)
    write_byte_tokenizer(path, 300)
    return path


def in_cluster(model_dir: Path, use: Use, **config: Any) -> None:
    async def work() -> None:
        async with (
            tiny_cluster(model_dir, **config) as cluster,
            serving(create_app(cluster.front)) as url,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ):
            await use(cluster, client)

    run(work(), timeout_s=120)


def oracle(model_dir: Path, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy tokens by transformers, end of sequence ignored."""
    model = transformers.MixtralForCausalLM.from_pretrained(model_dir, dtype=torch.float32)  # in eval mode
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(max_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_tokens_are_those_of_transformers(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    prompt = tokenizer.encode(PROMPT, add_bos=True)
    expected = oracle(model_dir, prompt, 12)

    async def use(cluster: TinyCluster, client: openai.AsyncOpenAI) -> None:
        asked: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0}
        more = {"ignore_eos": True, "return_token_ids": True}
        whole = await client.completions.create(prompt=PROMPT, **asked, extra_body=more)
        assert whole.choices[0].model_extra is not None
        assert whole.choices[0].model_extra["token_ids"] == expected
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), 12)
        stream = await client.completions.create(prompt=prompt, **asked, stream=True, extra_body={"ignore_eos": True})
        assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text

    in_cluster(model_dir, use)


def test_scores_generation_and_company(model_dir: Path) -> None:
    """Echoed log-probabilities score what was generated, and neighbours and seeds change nothing of an answer."""

    async def use(cluster: TinyCluster, client: openai.AsyncOpenAI) -> None:
        prompt = load_tokenizer(model_dir).encode(PROMPT, add_bos=True)
        asked: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "seed": 7, "logprobs": 1}
        body = {"ignore_eos": True, "return_token_ids": True}
        alone = (await client.completions.create(prompt=prompt, **asked, extra_body=body)).choices[0]
        assert alone.model_extra is not None
        assert alone.logprobs is not None
        said = alone.model_extra["token_ids"]
        scored = await client.completions.create(model=MODEL, prompt=prompt + said, max_tokens=0, echo=True, logprobs=1)
        replayed = scored.choices[0].logprobs
        assert replayed is not None
        assert replayed.token_logprobs is not None
        assert replayed.token_logprobs[-8:] == alone.logprobs.token_logprobs
        crowd = await asyncio.gather(
            *(client.completions.create(prompt=prompt, **{**asked, "n": n}, extra_body=body) for n in (1, 2, 3))
        )
        for answer in crowd:
            first = answer.choices[0]
            assert first.model_extra is not None
            assert first.model_extra["token_ids"] == said
            assert first.logprobs == alone.logprobs
        assert crowd[1].choices[1].text == crowd[2].choices[1].text, "choice 1 samples with seed + 1"

    in_cluster(model_dir, use)


def test_a_chat_with_stop_strings_and_usage(model_dir: Path) -> None:
    async def use(cluster: TinyCluster, client: openai.AsyncOpenAI) -> None:
        messages: Any = [{"role": "user", "content": "hello"}]
        asked: dict[str, Any] = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 40}
        free = await client.chat.completions.create(**asked, extra_body={"ignore_eos": True})
        text = free.choices[0].message.content
        assert text is not None
        stop = text[10:13]
        cut = await client.chat.completions.create(**asked, stop=stop, extra_body={"ignore_eos": True})
        assert cut.choices[0].message.content == text[: text.index(stop)]
        assert cut.choices[0].finish_reason == "stop"
        assert cut.usage is not None
        assert free.usage is not None
        assert cut.usage.completion_tokens < free.usage.completion_tokens == 40
        stream = await client.chat.completions.create(
            **asked, stop=stop, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
        )
        chunks = [chunk async for chunk in stream]
        assert (
            "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            == text[: text.index(stop)]
        )
        assert chunks[-1].usage == cut.usage

    in_cluster(model_dir, use)


def test_a_disconnect_frees_everything_at_the_coordinator(model_dir: Path) -> None:
    async def use(cluster: TinyCluster, client: openai.AsyncOpenAI) -> None:
        stream = await client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=480, n=4, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(stream)
        busy = await cluster.snapshot()
        assert busy.num_running == 4
        assert busy.kv_blocks_free < busy.kv_blocks_total
        await stream.close()
        idle = await cluster.until(lambda now: now.num_running == 0)
        assert idle.kv_blocks_free == idle.kv_blocks_total
        assert idle.generated_tokens_total < 4 * 480

    in_cluster(model_dir, use)


def test_overload_and_limits_come_through(model_dir: Path) -> None:
    async def use(cluster: TinyCluster, client: openai.AsyncOpenAI) -> None:
        many: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20}
        with pytest.raises(openai.RateLimitError) as full:
            await client.completions.create(**many, n=20, extra_body={"ignore_eos": True})
        assert int(full.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.BadRequestError) as long:
            await client.completions.create(model=MODEL, prompt="x" * 2000, max_tokens=5)
        assert long.value.code == "context_length_exceeded"
        assert (await client.completions.create(**many)).choices[0].finish_reason is not None
        await cluster.until(lambda now: now.num_running == 0)

    in_cluster(model_dir, use, max_num_seqs=2, max_waiting_requests=4)


def test_metrics_tell_of_the_experts(model_dir: Path) -> None:
    async def use(cluster: TinyCluster, client: openai.AsyncOpenAI) -> None:
        await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, extra_body={"ignore_eos": True})
        async with httpx2.AsyncClient() as plain:
            root = str(client.base_url).removesuffix("/v1/")
            text = (await plain.get(f"{root}/metrics")).text
            assert (await plain.get(f"{root}/health")).json() == {"status": "ok"}
        assert "octavo_generation_tokens_total 4.0" in text
        routed = [line for line in text.splitlines() if line.startswith("octavo_expert_tokens_total{")]
        assert len(routed) == 2 * 4, "layers times experts"
        assert sum(float(line.split()[-1]) for line in routed) > 0
        assert 'octavo_map_epoch{coordinator="coordinator-0"} 1.0' in text

    in_cluster(model_dir, use)
