"""Answers that have a form, over a real cluster in one process: HTTP, gRPC, the trial of grammars, arithmetic."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from actors.front.http_app import create_app
from tests.support.checkpoints import write_mixtral
from tests.support.front import run, serving
from tests.support.tiny_cluster import TinyCluster, tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

MODEL = "tiny"
Use = Callable[[TinyCluster, openai.AsyncOpenAI], Awaitable[None]]
MESSAGES: Any = [{"role": "user", "content": "Who?"}]
COLOURS = ["red", "green", "blue-ish"]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "colour": {"enum": COLOURS},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "colour", "age"],
    "additionalProperties": False,
}


class Person(pydantic.BaseModel):
    """What a pydantic user asks for."""

    model_config = pydantic.ConfigDict(extra="forbid")

    colour: Literal["red", "green"]
    age: Literal[1, 2, 30]


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

    run(work(), timeout_s=240)


def compact(schema: dict[str, Any]) -> dict[str, Any]:
    """Without white space, of which a random model is fond."""
    return {"structured_outputs": {"json": schema, "disable_any_whitespace": True}}


def test_every_form_on_both_endpoints(model_dir: Path) -> None:
    async def use(cluster: TinyCluster, client: openai.AsyncOpenAI) -> None:
        async def chat(**more: Any) -> str:
            answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=400, **more)
            assert answer.choices[0].finish_reason == "stop", answer.choices[0]
            return answer.choices[0].message.content or ""

        async def text(**more: Any) -> str:
            answer = await client.completions.create(
                model=MODEL, prompt="Once", max_tokens=400, temperature=1.0, seed=5, extra_body=more
            )
            assert answer.choices[0].finish_reason == "stop", answer.choices[0]
            return answer.choices[0].text

        schema = {"name": "person", "schema": PERSON, "strict": True}
        said = await chat(response_format={"type": "json_schema", "json_schema": schema}, seed=3)
        jsonschema.validate(json.loads(said), PERSON)
        jsonschema.validate(json.loads(await chat(temperature=0, extra_body=compact(PERSON))), PERSON)
        jsonschema.validate(json.loads(await text(**compact(PERSON))), PERSON)
        jsonschema.validate(json.loads(await text(guided_json=json.dumps(PERSON))), PERSON)
        assert re.fullmatch(r"[ab]{3,5}-\d", await text(structured_outputs={"regex": r"[ab]{3,5}-[0-9]"}))
        assert await chat(seed=1, extra_body={"structured_outputs": {"choice": COLOURS}}) in COLOURS
        assert await text(guided_choice=[" red", "ré d\n"]) in (" red", "ré d\n")
        lark = 'start: "<" word ("," word)? ">"\nword: /[a-c]{2}/'
        assert re.fullmatch(r"<[a-c]{2}(,[a-c]{2})?>", await text(structured_outputs={"grammar": lark}))
        gbnf = 'root ::= "<" word ("," word)? ">"\nword ::= [a-c] [a-c]\n'
        assert re.fullmatch(r"<[a-c]{2}(,[a-c]{2})?>", await chat(seed=2, extra_body={"guided_grammar": gbnf}))
        plain = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=8, response_format={"type": "text"}
        )
        assert plain.choices[0].finish_reason in ("length", "stop")
        counted = await cluster.snapshot()
        assert (counted.grammars_compiled_total, counted.grammar_hits_total) == (7, 2)
        assert counted.grammars_refused_total == 0
        assert counted.grammar_masks_total > 20
        assert counted.grammar_mask_s_total > 0

    in_cluster(model_dir, use)


def test_openais_client_parses_what_pydantic_describes(model_dir: Path) -> None:
    async def use(cluster: TinyCluster, client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.parse(
            model=MODEL, messages=MESSAGES, response_format=Person, max_tokens=400, n=3, seed=11
        )
        assert len(answer.choices) == 3
        for choice in answer.choices:
            assert isinstance(choice.message.parsed, Person)
        assert (await cluster.snapshot()).grammars_compiled_total == 1, "three choices share one grammar"

    in_cluster(model_dir, use)


def test_a_bad_grammar_is_the_clients_fault_and_its_field_is_named(model_dir: Path) -> None:
    async def use(cluster: TinyCluster, client: openai.AsyncOpenAI) -> None:
        async def refused(field: str, *words: str, **more: Any) -> None:
            for stream in (False, True):
                with pytest.raises(openai.BadRequestError) as caught:
                    await client.chat.completions.create(
                        model=MODEL, messages=MESSAGES, stream=stream, max_tokens=5, extra_body=more
                    )
                assert caught.value.param == field, caught.value
                for word in words:
                    assert word in caught.value.message, caught.value

        def schema(value: Any) -> dict[str, Any]:
            return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}

        where = "response_format.json_schema.schema"
        await refused(where, "strin", response_format=schema({"type": "strin"}))
        await refused(where, "minimum (5)", response_format=schema({"type": "integer", "minimum": 5, "maximum": 3}))
        await refused(where, "131072", response_format=schema({"description": "x" * (1 << 20)}))
        await refused(where, "not", response_format=schema({"not": {"type": "string"}}))
        deep: Any = {"type": "string"}
        for _ in range(70):
            deep = {"type": "array", "items": deep}
        await refused(where, "64", response_format=schema(deep))
        await refused("response_format.type", "json_schema", response_format={"type": "xml"})
        await refused("response_format.json_schema", "Missing", response_format={"type": "json_schema"})
        await refused("structured_outputs.regex", "unclosed", structured_outputs={"regex": "(a"})
        await refused("structured_outputs.regex", "look-around", structured_outputs={"regex": "(?=a)b"})
        await refused("structured_outputs.regex", "16384", structured_outputs={"regex": "a" * 20000})
        await refused("structured_outputs.choice", "non-empty", structured_outputs={"choice": []})
        await refused("structured_outputs.grammar", "nowhere", structured_outputs={"grammar": "start: nowhere"})
        await refused("guided_grammar", "no text", guided_grammar="start: A\nA: /[a-z]+/ & /[0-9]+/")
        await refused("structured_outputs", "exactly one", structured_outputs={"regex": "a", "choice": ["b"]})
        await refused("structured_outputs", "exactly one", structured_outputs={})
        await refused("guided_choice", "only one", structured_outputs={"regex": "a"}, guided_choice=["b"])
        await refused("structured_outputs.json", "not JSON", structured_outputs={"json": "{"})
        answer = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=50, extra_body={"guided_choice": ["yes"]}
        )
        assert answer.choices[0].message.content == "yes"

    in_cluster(model_dir, use)


def test_a_stream_that_is_cut_goes_on_in_its_grammar(model_dir: Path) -> None:
    async def use(cluster: TinyCluster, client: openai.AsyncOpenAI) -> None:
        asked: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 300, "seed": 8, "stream": True}
        asked["extra_body"] = compact(PERSON)

        async def told(**more: Any) -> tuple[str, list[str]]:
            async with client.chat.completions.with_streaming_response.create(**asked, **more) as response:
                text, ids = "", []
                async for line in response.iter_lines():
                    if line.startswith("id: "):
                        ids.append(line[4:])
                    elif line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            return text, ids

        whole, ids = await told()
        jsonschema.validate(json.loads(whole), PERSON)
        assert len(ids) > 2, "it has a middle"
        for forget in (False, True):
            if forget:
                cluster.front.memory._streams.clear()
            rest, _ = await told(extra_headers={"Last-Event-ID": ids[len(ids) // 2]})
            assert rest, "something was left"
            assert whole.endswith(rest)

    in_cluster(model_dir, use)


def test_many_at_once_are_what_they_are_alone(model_dir: Path) -> None:
    async def use(cluster: TinyCluster, client: openai.AsyncOpenAI) -> None:
        async def say(seed: int) -> str:
            form = [compact(PERSON), {"guided_regex": "[a-z ]{5,30}!"}, {}][seed % 3]
            answer = await client.completions.create(
                model=MODEL, prompt="Once", max_tokens=60, seed=seed, extra_body=form
            )
            return answer.choices[0].text

        alone = [await say(seed) for seed in range(9)]
        assert await asyncio.gather(*(say(seed) for seed in range(9))) == alone

    in_cluster(model_dir, use)
