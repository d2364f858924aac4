"""The prefix cache as a client sees it: `cached_tokens` in the usage, salts, and the same answers without it."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import typer

import actors.cli
from actors.front.http_app import create_app
from cluster.config import ClusterConfig, from_environment
from tests.support.checkpoints import write_mixtral
from tests.support.front import run, serving
from tests.support.tiny_cluster import TinyCluster, tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

PROMPT = [1, *range(20, 97)]
TOKENS = len(PROMPT)
FOUND = (TOKENS - 1) // 32 * 32

Ask = Callable[..., Awaitable[dict[str, Any]]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral with a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("tiny")
    write_mixtral(path)
    write_byte_tokenizer(path, 300)
    return path


def in_cluster(model_dir: Path, use: Callable[[TinyCluster, Ask], Awaitable[None]], **config: Any) -> None:
    async def work() -> None:
        async with (
            tiny_cluster(model_dir, **config) as cluster,
            serving(create_app(cluster.front)) as url,
            httpx2.AsyncClient(base_url=url, timeout=200) as client,
        ):

            async def ask(**fields: Any) -> dict[str, Any]:
                body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
                response = await client.post("/v1/completions", json={**body, "logprobs": 2, **fields})
                answer: dict[str, Any] = response.json()
                return answer

            await use(cluster, ask)

    run(work())


def cached(answer: dict[str, Any]) -> int:
    assert answer["usage"]["prompt_tokens"] % TOKENS == 0
    found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_usage_says_what_was_found_and_salts_do_not_meet(model_dir: Path) -> None:
    async def use(cluster: TinyCluster, ask: Ask) -> None:
        cold = await ask()
        assert [cached(answer) for answer in (cold, await ask(), await ask())] == [0, FOUND, FOUND]
        salted = [await ask(cache_salt=salt) for salt in ("a", "b", "a", "c", "b")]
        assert [cached(answer) for answer in salted] == [0, 0, FOUND, 0, FOUND]
        assert all(answer["choices"] == cold["choices"] for answer in salted)
        twice = await ask(prompt=[PROMPT, PROMPT], n=2)
        assert cached(twice) == 2 * FOUND, "a prompt counts once, however many choices it has"
        assert [choice["logprobs"]["token_logprobs"] for choice in twice["choices"]] == [
            cold["choices"][0]["logprobs"]["token_logprobs"]
        ] * 4
        echoed = await ask(echo=True)
        assert cached(echoed) == 0, "every token of the prompt is scored, and so computed"
        now = await cluster.snapshot()
        assert now.prefix_hits_tokens_total % 32 == 0
        assert now.prefix_queries_tokens_total > now.prefix_hits_tokens_total > 0
        assert 0 < now.kv_blocks_cached <= now.kv_blocks_total
        assert now.kv_blocks_free == now.kv_blocks_total

    in_cluster(model_dir, use)


@pytest.mark.parametrize(("salt", "said"), [("", "1 to 256 bytes"), ("ä" * 129, "1 to 256 bytes"), (5, "string")])
def test_a_salt_that_cannot_be(model_dir: Path, salt: object, said: str) -> None:
    async def use(cluster: TinyCluster, ask: Ask) -> None:
        error = (await ask(cache_salt=salt))["error"]
        assert error["param"] == "cache_salt"
        assert said in error["message"]

    in_cluster(model_dir, use)


def test_off_nothing_is_found_and_the_answers_are_the_same(model_dir: Path) -> None:
    answers: list[list[dict[str, Any]]] = []

    async def use(cluster: TinyCluster, ask: Ask) -> None:
        answers.append([await ask() for _ in range(2)])

    in_cluster(model_dir, use)
    in_cluster(model_dir, use, prefix_caching=False)
    assert [[cached(one) for one in both] for both in answers] == [[0, FOUND], [0, 0]]
    assert len({str(one["choices"]) for both in answers for one in both}) == 1


def test_it_is_switched_off_on_the_command_line() -> None:
    serve = typer.main.get_command(actors.cli.app).commands["serve"]  # type: ignore[attr-defined]
    (option,) = [one for one in serve.params if one.name == "prefix_caching"]
    assert (option.opts, option.secondary_opts, option.default) == (["--prefix-caching"], ["--no-prefix-caching"], True)
    assert from_environment(ClusterConfig(model="m"), {"OCTAVO_PREFIX_CACHING": "0"}).prefix_caching is False
