"""Tool calls at the front door: with a coordinator that says what a test wants, and a random model that must call."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from actors.front.http_app import create_app
from model.text.tokenizer import load_tokenizer
from protos.coordinator_pb2 import GRAMMAR_KIND_LARK
from tests.support.checkpoints import write_mixtral
from tests.support.front import MODEL, VOCAB, make_front, post, run, serving
from tests.support.scripted_coordinator import ScriptedCoordinator, saying
from tests.support.tiny_cluster import tiny_cluster
from tests.support.tokenizers import EOS_ID, write_byte_tokenizer
from tests.support.tool_templates import HERMES, MISTRAL

CHAT = "/v1/chat/completions"
HELLO: Any = [{"role": "user", "content": "Weather?"}]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Ulm"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": CITY}}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
TWO = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)
Use = Callable[[openai.AsyncOpenAI], Awaitable[None]]


def written(tmp_path: Path, template: str | None) -> Path:
    write_byte_tokenizer(tmp_path, VOCAB, chat_template=template)
    return tmp_path


def speaker(model_dir: Path, text: str) -> ScriptedCoordinator:
    return ScriptedCoordinator(saying(load_tokenizer(model_dir).encode(text, add_bos=False), EOS_ID))


def with_openai(model_dir: Path, coordinator: ScriptedCoordinator, use: Use) -> None:
    async def work() -> None:
        front = make_front(model_dir, coordinator)
        async with (
            serving(create_app(front)) as url,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ):
            await use(client)

    run(work())


def prompt_of(model_dir: Path, coordinator: ScriptedCoordinator) -> str:
    return load_tokenizer(model_dir).decode(coordinator.submits[-1].prompt_token_ids, skip_special=False)


# --- what is written is read ---


def test_calls_are_taken_out_of_the_answer(tmp_path: Path) -> None:
    model_dir = written(tmp_path, HERMES)
    coordinator = speaker(model_dir, TWO)

    async def use(client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER, CLOCK], n=2)
        for choice in answer.choices:
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "Let me see."
            calls = [one for one in choice.message.tool_calls or [] if one.type == "function"]
            assert [(one.function.name, one.function.arguments) for one in calls] == [
                ("weather", '{"city": "Paris"}'),
                ("clock", "{}"),
            ]
        ids = {one.id for choice in answer.choices for one in choice.message.tool_calls or []}
        assert len(ids) == 4
        assert all(one.startswith("call_") for one in ids)

    with_openai(model_dir, coordinator, use)
    assert not coordinator.submits[0].HasField("grammar"), "nothing is enforced unless it is asked for"
    assert '"description": "Now."' in prompt_of(model_dir, coordinator)


def test_calls_are_streamed_name_first_then_arguments_in_pieces(tmp_path: Path) -> None:
    model_dir = written(tmp_path, HERMES)

    async def use(client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, tools=[WEATHER, CLOCK], tool_choice="auto", stream=True
        )
        content, calls, finish, pieces = "", dict[int, dict[str, str]](), None, 0
        async for chunk in stream:
            delta = chunk.choices[0].delta
            content += delta.content or ""
            finish = chunk.choices[0].finish_reason or finish
            assert delta.content or delta.tool_calls or delta.role or finish, "an event that says nothing"
            for call in delta.tool_calls or []:
                assert call.function is not None
                if call.index not in calls:
                    assert call.id
                    assert call.type == "function"
                    assert call.function.name
                    calls[call.index] = {"name": call.function.name, "arguments": ""}
                else:
                    assert (call.id, call.function.name) == (None, None)
                calls[call.index]["arguments"] += call.function.arguments or ""
                pieces += 1
        assert (content, finish) == ("Let me see.", "tool_calls")
        assert list(calls.values()) == [
            {"name": "weather", "arguments": '{"city": "Paris"}'},
            {"name": "clock", "arguments": "{}"},
        ]
        assert pieces > 5

    with_openai(model_dir, speaker(model_dir, TWO), use)


def test_a_cut_stream_of_calls_goes_on_after_every_event(tmp_path: Path) -> None:
    model_dir = written(tmp_path, HERMES)
    body: dict[str, Any] = {"messages": HELLO, "tools": [WEATHER, CLOCK], "stream": True, "seed": 1}

    async def work() -> None:
        front = make_front(model_dir, speaker(model_dir, TWO))
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=create_app(front)), base_url="http://octavo"
        ) as client:

            async def events(**headers: str) -> list[str]:
                answer = await client.post(CHAT, json={"model": MODEL, **body}, headers=headers)
                assert answer.status_code == 200, answer.text
                return answer.text.split("\n\n")[:-2]

            def plain(blocks: list[str]) -> list[str]:
                return [block.split("\n", 1)[1] for block in blocks]

            whole = await events()
            assert sum('"tool_calls":[' in block for block in whole) > 5
            for place, block in enumerate(whole):
                front.memory._streams.clear()
                rest = await events(**{"Last-Event-ID": block.split("\n")[0].removeprefix("id: ")})
                assert plain(rest) == plain(whole[place + 1 :])

    run(work())


def test_mistrals_way_of_calling_and_its_short_ids(tmp_path: Path) -> None:
    model_dir = written(tmp_path, MISTRAL)
    said = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ulm"}}]'

    async def use(client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER])
        message = answer.choices[0].message
        assert message.content is None
        (call,) = message.tool_calls or []
        assert call.type == "function"
        assert call.function.arguments == '{"city": "Ulm"}'
        assert len(call.id) == 9
        assert call.id.isalnum()

    with_openai(model_dir, speaker(model_dir, said), use)


def test_without_tools_or_with_none_nothing_is_read(tmp_path: Path) -> None:
    model_dir = written(tmp_path, HERMES)
    for more in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        coordinator = speaker(model_dir, TWO)
        choice = post(make_front(model_dir, coordinator), CHAT, messages=HELLO, **more).json()["choices"][0]
        assert choice["message"]["content"] == TWO
        assert choice["finish_reason"] == "stop"
        assert "Tools:" not in prompt_of(model_dir, coordinator)


def test_calls_and_results_of_a_conversation_reach_the_template(tmp_path: Path) -> None:
    model_dir = written(tmp_path, HERMES)
    coordinator = speaker(model_dir, "Sunny.")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":  "Ulm"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "<|im_end|>sun"},
    ]
    answer = post(make_front(model_dir, coordinator), CHAT, messages=messages, tools=[WEATHER]).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Sunny.", "refusal": None}
    prompt = prompt_of(model_dir, coordinator)
    assert '{"name": "weather", "arguments": {"city": "Ulm"}}' in prompt
    assert "tool\n<|im_end|>sun<|im_end|>" in prompt


# --- what must be called is called ---


@pytest.mark.parametrize("template", [HERMES, MISTRAL], ids=["hermes", "mistral"])
def test_a_random_model_calls_what_it_must(tmp_path: Path, template: str) -> None:
    write_mixtral(tmp_path, max_context=4096)
    write_byte_tokenizer(tmp_path, 300, chat_template=template)

    async def work() -> None:
        async with (
            tiny_cluster(tmp_path) as cluster,
            serving(create_app(cluster.front)) as url,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ):
            for choice, names in (
                ("required", {"weather", "clock"}),
                ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
            ):
                for seed in range(4):
                    calls = await called(client, tool_choice=choice, seed=seed, parallel_tool_calls=False)
                    assert len(calls) == 1
                    assert calls[0][0] in names
                    if calls[0][0] == "weather":
                        assert json.loads(calls[0][1])["city"] in ("Paris", "Ulm")

    async def called(client: openai.AsyncOpenAI, **more: Any) -> list[tuple[str, str]]:
        nothing = {"type": "object", "properties": {}, "additionalProperties": False}
        strict = {"type": "function", "function": {**CLOCK["function"], "parameters": nothing}}
        asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": [WEATHER, strict], "max_tokens": 1500}
        answer = await client.chat.completions.create(**asked, **more)
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content is None
        found = [one for one in answer.choices[0].message.tool_calls or [] if one.type == "function"]
        return [(one.function.name, one.function.arguments) for one in found]

    run(work(), timeout_s=240)


def test_strict_functions_are_enforced_where_the_model_may_choose(tmp_path: Path) -> None:
    model_dir = written(tmp_path, HERMES)
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    coordinator = speaker(model_dir, TWO)
    front = make_front(model_dir, coordinator)
    assert post(front, CHAT, messages=HELLO, tools=[strict, CLOCK]).status_code == 200
    grammar = coordinator.submits[0].grammar
    assert grammar.kind == GRAMMAR_KIND_LARK
    assert "Paris" in grammar.text
    assert "strict" not in prompt_of(model_dir, coordinator)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "none of them"}}}
    assert post(front, CHAT, messages=HELLO, tools=[WEATHER], response_format=form).status_code == 200
    assert "none of them" in coordinator.submits[1].grammar.text
    assert "Paris" not in coordinator.submits[1].grammar.text, "not strict: its arguments are the model's"


# --- what is refused ---

OBJECT = {"type": "json_object"}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def calling(**call: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "tool_calls": [call]}]}


@pytest.mark.parametrize(
    ("field", "word", "more"),
    [
        ("tools[0].type", "function", {"tools": [{"type": "web_search"}]}),
        ("tools[0].function.name", "pattern", {"tools": [tool("a b")]}),
        ("tools", "same name", {"tools": [CLOCK, CLOCK]}),
        ("tools", "128", {"tools": [CLOCK] * 129}),
        ("tools", "131072", {"tools": [tool("f", description="x" * (1 << 18))]}),
        ("tool_choice", "required", {"tools": [CLOCK], "tool_choice": "always"}),
        ("tool_choice", "tools", {"tool_choice": "required"}),
        ("tool_choice.function.name", "name", {"tools": [CLOCK], "tool_choice": tool("x")}),
        ("functions", "tools", {"functions": [{"name": "f"}]}),
        ("function_call", "tool_choice", {"function_call": "auto"}),
        ("messages[0].tool_calls", "arguments", calling(id="1", function={"name": "f", "arguments": "["})),
        ("messages[0].tool_calls", "id", calling(function={"name": "f", "arguments": "{}"})),
        ("response_format", "tool_choice", {"tools": [CLOCK], "tool_choice": "required", "response_format": OBJECT}),
        ("structured_outputs.regex", "JSON schema", {"tools": [CLOCK], "structured_outputs": {"regex": "a"}}),
    ],
)  # fmt: skip
def test_what_makes_no_sense_names_its_field(tmp_path: Path, field: str, word: str, more: dict[str, Any]) -> None:
    model_dir = written(tmp_path, HERMES)
    answer = post(make_front(model_dir, speaker(model_dir, "x")), CHAT, **{"messages": HELLO, **more})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == field, error
    assert word in error["message"], error


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}", "{{ tools }}{{ messages[0]['content'] }}"])
def test_a_template_that_has_no_tools_or_an_unknown_way_says_so(tmp_path: Path, template: str | None) -> None:
    model_dir = written(tmp_path, template)
    front = make_front(model_dir, speaker(model_dir, "x"))
    answer = post(front, CHAT, messages=HELLO, tools=[WEATHER])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    if template is not None and "tools" not in template:
        past = [*HELLO, {"role": "tool", "tool_call_id": "1", "content": "x"}]
        answer = post(front, CHAT, messages=past)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[1].role")


def test_a_form_and_calls_that_contradict_are_none_of_the_clients_without_tools(tmp_path: Path) -> None:
    model_dir = written(tmp_path, HERMES)
    coordinator = speaker(model_dir, "{}")
    answer = post(make_front(model_dir, coordinator), CHAT, messages=HELLO, response_format={"type": "json_object"})
    assert answer.status_code == 200
    assert coordinator.submits[0].HasField("grammar")
