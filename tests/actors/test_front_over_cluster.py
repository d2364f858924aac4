"""The front door over a real cluster in one process: HTTP, gRPC and arithmetic together; transformers is the oracle."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
import transformers

from actors.channels import WireCredentials
from actors.front.coordinator_client import CoordinatorClient
from actors.front.front_door import load_front
from actors.front.http_app import create_app
from model.text.tokenizer import load_tokenizer
from tests.support.checkpoints import write_mixtral
from tests.support.front import run, serving
from tests.support.held_steps import hold_steps
from tests.support.tiny_cluster import TOKEN, TinyCluster, tiny_cluster
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

    run(work())


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
        gate = hold_steps(cluster.coordinator._engine, free=100)  # nobody is done before the client leaves
        stream = await client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=480, n=4, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(stream)
        busy = await cluster.until(lambda now: now.num_running == 4)
        assert busy.kv_blocks_free < busy.kv_blocks_total
        await stream.close()
        await cluster.until(lambda now: now.num_running == 0)
        gate.set()
        # What a step still reads is given back when the step ends.
        idle = await cluster.until(lambda now: now.num_running == 0 and now.kv_blocks_free == now.kv_blocks_total)
        assert idle.generated_tokens_total < 4 * 480

    in_cluster(model_dir, use)


@pytest.mark.parametrize("kind", [{"temperature": 0}, {"temperature": 0.9, "n": 2, "stop": ["zq"]}], ids=str)
def test_a_stream_that_was_cut_goes_on_at_another_ingress(model_dir: Path, kind: dict[str, Any]) -> None:
    """The connection is cut; everything is freed; two ingresses, one of which has never seen it, go on with it."""
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 240, "ignore_eos": True, "stream": True, **kind}

    async def use(cluster: TinyCluster, client: openai.AsyncOpenAI) -> None:
        here = str(client.base_url) + "completions"
        front = load_front(
            model_dir,
            [CoordinatorClient(cluster.address, WireCredentials(TOKEN))],
            model_id=MODEL,
            max_model_len=cluster.front.max_model_len,
            system_fingerprint=cluster.front.system_fingerprint,
            request_timeout_s=600.0,
        )
        async with serving(create_app(front)) as url, httpx2.AsyncClient(timeout=120) as plain:
            elsewhere = f"{url}/v1/completions"
            gate = hold_steps(cluster.coordinator._engine, free=150)  # it is not done before it is cut
            begun = await read_events(plain, here, asked, stop_after=9)
            await cluster.until(lambda now: now.num_running == 0)
            gate.set()
            # What a step still reads is given back when the step ends.
            idle = await cluster.until(lambda now: now.num_running == 0 and now.kv_blocks_free == now.kv_blocks_total)
            assert idle.generated_tokens_total < 240 * asked.get("n", 1), "it was cut in the middle"
            rest_here = await read_events(plain, here, asked, last=begun[-1][0])
            rest_there = await read_events(plain, elsewhere, asked, last=begun[-1][0])
            again = {**asked, "stream": False, "seed": int(begun[0][0].split("-")[3], 16)}
            whole = (await plain.post(elsewhere, json=again)).json()
        expected = [(choice["text"], choice["finish_reason"]) for choice in whole["choices"]]
        for rest in (rest_here, rest_there):
            texts = [("", None)] * len(expected)
            for _, data in (*begun, *rest):
                for choice in data["choices"]:
                    text, _ = texts[choice["index"]]
                    texts[choice["index"]] = (text + choice["text"], choice["finish_reason"])
            assert texts == expected
        assert len({(data["id"], data["created"]) for _, data in (*begun, *rest_here, *rest_there)}) == 1
        await cluster.until(lambda now: now.num_running == 0)

    in_cluster(model_dir, use)


async def read_events(
    client: httpx2.AsyncClient, url: str, body: dict[str, Any], last: str | None = None, stop_after: int = 10_000
) -> list[tuple[str, dict[str, Any]]]:
    """Ids and data of a stream's events; the connection is dropped after `stop_after`, else it ends with [DONE]."""
    headers = {} if last is None else {"Last-Event-ID": last}
    found: list[tuple[str, dict[str, Any]]] = []
    async with client.stream("POST", url, json=body, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        event_id = ""
        async for line in response.aiter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                event_id = value
            elif value == "[DONE]":
                return found
            elif name == "data":
                found.append((event_id, json.loads(value)))
                if len(found) == stop_after:
                    return found
    raise AssertionError(f"the stream ended after {found}")


def scores_of(model_dir: Path, ids: list[int]) -> tuple[list[float], list[dict[int, float]]]:
    """By transformers: each token's log-probability after the first, and the two likeliest in its place."""
    model = transformers.MixtralForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], dim=-1)
    top = [dict(zip(one.indices.tolist(), one.values.tolist(), strict=True)) for one in map(_top_two, logprobs)]
    return [float(row[token]) for row, token in zip(logprobs, ids[1:], strict=True)], top


def _top_two(row: torch.Tensor) -> Any:
    return row.topk(2)


def test_a_prompt_longer_than_a_step_is_scored_whole_as_transformers_scores_it(model_dir: Path) -> None:
    """What lm-eval asks for, in steps of 32 tokens, on both endpoints."""
    text = "the quick brown fox jumps over the lazy dog, " * 3

    async def use(cluster: TinyCluster, client: openai.AsyncOpenAI) -> None:
        ids = load_tokenizer(model_dir).encode(text, add_bos=True)
        assert len(ids) > 3 * 32
        expected, likeliest = scores_of(model_dir, ids)
        echoed = await client.completions.create(
            model=MODEL, prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0, seed=1
        )
        told = echoed.choices[0].logprobs
        assert told is not None
        assert told.token_logprobs is not None
        assert told.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
        body = {"prompt_logprobs": 2}
        scored = await client.completions.create(model=MODEL, prompt=ids, max_tokens=2, extra_body=body)
        check_scores((scored.choices[0].model_extra or {})["prompt_logprobs"], ids, expected, likeliest)
        messages: Any = [{"role": "user", "content": text}]
        more = {**body, "return_token_ids": True}
        chat = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2, extra_body=more)
        extra = chat.model_extra or {}
        prompt = extra["prompt_token_ids"]
        check_scores(extra["prompt_logprobs"], prompt, *scores_of(model_dir, prompt))

    in_cluster(model_dir, use, max_num_batched_tokens=32, max_num_seqs=8)


def check_scores(
    found: list[dict[str, Any] | None], ids: list[int], expected: list[float], likeliest: list[dict[int, float]]
) -> None:
    assert found[0] is None
    assert len(found) == len(ids)
    for place, token, logprob, top in zip(found[1:], ids[1:], expected, likeliest, strict=True):
        assert place is not None
        assert set(place) == {str(one) for one in (token, *top)}
        assert place[str(token)]["logprob"] == pytest.approx(logprob, abs=1e-4)
        for rank, (one, value) in enumerate(top.items(), start=1):
            assert place[str(one)]["rank"] == rank
            assert place[str(one)]["logprob"] == pytest.approx(value, abs=1e-4)


def test_rules_about_tokens_hold_in_what_is_generated(model_dir: Path) -> None:
    """Over HTTP, gRPC and the engine, with guessing ahead: a bias decides, what is allowed comes, bad words never."""

    async def use(cluster: TinyCluster, client: openai.AsyncOpenAI) -> None:
        tokenizer = load_tokenizer(model_dir)
        asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "temperature": 1.5, "seed": 3}
        more = {"ignore_eos": True, "return_token_ids": True}

        async def said(**fields: Any) -> list[int]:
            extra = {
                name: fields.pop(name)
                for name in ("bad_words", "allowed_token_ids", "stop_token_ids")
                if name in fields
            }
            answer = await client.completions.create(**asked, **fields, extra_body={**more, **extra})
            ids: list[int] = (answer.choices[0].model_extra or {})["token_ids"]
            return ids

        assert await said(logit_bias={"77": 100}) == [77] * 40
        allowed = list(range(70, 96))
        assert set(await said(allowed_token_ids=allowed)) <= set(allowed)
        biased = await said(allowed_token_ids=[70, 71], logit_bias={"70": 3})
        assert biased.count(70) > biased.count(71) > 0
        words = ["AB", "BA", "C"]
        kept = await said(allowed_token_ids=[70, 71, 72], bad_words=words)
        text = tokenizer.decode(kept)
        assert set(text) in ({"A"}, {"B"}), "after A only A may come, after B only B"
        with pytest.raises(openai.BadRequestError, match="no token may come next"):
            await said(allowed_token_ids=[72], bad_words=["C"])
        assert (await cluster.snapshot()).num_running == 0

    in_cluster(model_dir, use, speculation="prompt_lookup")


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
        async with httpx2.AsyncClient(timeout=120) as plain:
            root = str(client.base_url).removesuffix("/v1/")
            text = (await plain.get(f"{root}/metrics")).text
            assert (await plain.get(f"{root}/health")).json() == {"status": "ok"}
        assert "octavo_generation_tokens_total 4.0" in text
        routed = [line for line in text.splitlines() if line.startswith("octavo_expert_tokens_total{")]
        assert len(routed) == 4, "one by expert, over all layers"
        assert sum(float(line.split()[-1]) for line in routed) > 0
        assert 'octavo_map_epoch{coordinator="coordinator-0"} 1.0' in text

    in_cluster(model_dir, use)
