"""What a request asks of its answer's form, as its coordinator hears it, and whose fault a bad one is."""

import json
from pathlib import Path
from typing import Any

import pytest

from protos.coordinator_pb2 import (
    GRAMMAR_KIND_CHOICE,
    GRAMMAR_KIND_JSON_SCHEMA,
    GRAMMAR_KIND_LARK,
    GRAMMAR_KIND_REGEX,
    Grammar,
)
from protos.expert_pb2 import STATUS_INVALID
from tests.support.front import make_front, post
from tests.support.scripted_coordinator import ScriptedCoordinator, failing, saying
from tests.support.tokenizers import EOS_ID

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "null"}}}
NAMELESS = {"type": "json_schema", "json_schema": {}}
OPTIONS = {"coerce_one_of": True, "whitespace_pattern": r"[ \t\r\n]{1,32}"}


def heard(tmp_path: Path, path: str = TEXT, **body: Any) -> Grammar | None:
    """The grammar of the one submission."""
    coordinator = ScriptedCoordinator(saying([70], EOS_ID))
    prompt: dict[str, Any] = {"messages": HELLO} if path == CHAT else {"prompt": "p"}
    answer = post(make_front(tmp_path, coordinator), path, **prompt, **body)
    assert answer.status_code == 200, answer.text
    (submit,) = coordinator.submits
    return submit.grammar if submit.HasField("grammar") else None


def refused(tmp_path: Path, path: str = TEXT, **body: Any) -> dict[str, Any]:
    coordinator = ScriptedCoordinator(saying([70], EOS_ID))
    prompt: dict[str, Any] = {"messages": HELLO} if path == CHAT else {"prompt": "p"}
    answer = post(make_front(tmp_path, coordinator), path, **prompt, **body)
    assert answer.status_code == 400, answer.text
    assert not coordinator.submits, "refused before anybody is asked"
    error: dict[str, Any] = answer.json()["error"]
    return error


def named(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize(
    ("body", "schema"),
    [
        ({"response_format": named(SCHEMA)}, {**SCHEMA, "x-guidance": OPTIONS}),
        ({"response_format": {"type": "json_object"}}, {"type": "object", "x-guidance": OPTIONS}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, {"type": "object"}),
        ({"structured_outputs": {"json": SCHEMA}}, SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, SCHEMA),
        ({"structured_outputs": {"json_object": True}}, {"type": "object"}),
        ({"guided_json": SCHEMA}, SCHEMA),
        (
            {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}},
            {**SCHEMA, "x-guidance": {**OPTIONS, "whitespace_pattern": " ?"}},
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            {**SCHEMA, "x-guidance": {"coerce_one_of": True, "whitespace_flexible": False}},
        ),
        (
            {"guided_json": {**SCHEMA, "x-guidance": {"coerce_one_of": False}}, "guided_whitespace_pattern": " "},
            {**SCHEMA, "x-guidance": {"coerce_one_of": False, "whitespace_pattern": " "}},
        ),
    ],
)
def test_json_is_asked_for_by_its_schema_in_the_schemas_order(
    tmp_path: Path, body: dict[str, Any], schema: dict[str, Any]
) -> None:
    for path in (TEXT, CHAT):
        grammar = heard(tmp_path, path, **body)
        assert grammar is not None
        assert grammar.kind == GRAMMAR_KIND_JSON_SCHEMA
        told = json.loads(grammar.text)
        assert told == {"x-guidance": OPTIONS, **schema}
        assert list(told.get("properties", SCHEMA["properties"])) == ["b", "a"]


def test_other_forms_travel_as_they_are_written(tmp_path: Path) -> None:
    for body, kind, text in (
        ({"structured_outputs": {"regex": "a+"}}, GRAMMAR_KIND_REGEX, "a+"),
        ({"guided_regex": "a+"}, GRAMMAR_KIND_REGEX, "a+"),
        ({"structured_outputs": {"choice": ["a", "é"]}}, GRAMMAR_KIND_CHOICE, '["a", "é"]'),
        ({"guided_choice": ["a"]}, GRAMMAR_KIND_CHOICE, '["a"]'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, GRAMMAR_KIND_LARK, 'start: "a"'),
        ({"guided_grammar": 'root ::= "a"'}, GRAMMAR_KIND_LARK, 'root ::= "a"'),
    ):
        assert heard(tmp_path, **body) == Grammar(kind=kind, text=text)


def test_free_text_is_not_held_to_anything(tmp_path: Path) -> None:
    for body in ({}, {"response_format": {"type": "text"}}, {"response_format": None}):
        assert heard(tmp_path, CHAT, **body) is None


@pytest.mark.parametrize(
    ("field", "word", "body"),
    [
        ("response_format.type", "json_schema", {"response_format": {"type": "yaml"}}),
        ("response_format.type", "Missing", {"response_format": {}}),
        ("response_format.json_schema", "Missing", {"response_format": {"type": "json_schema"}}),
        ("response_format.json_schema.name", "Missing", {"response_format": NAMELESS}),
        ("response_format.json_schema.schema", "an object", {"response_format": named([])}),
        ("structured_outputs", "exactly one", {"structured_outputs": {"json_object": False}}),
        ("structured_outputs", "exactly one", {"structured_outputs": {"regex": "a", "json_object": True}}),
        ("structured_outputs.structural_tag", "not supported", {"structured_outputs": {"structural_tag": "{}"}}),
        (
            "structured_outputs.disable_additional_properties",
            "additionalProperties",
            {"structured_outputs": {"json": SCHEMA, "disable_additional_properties": True}},
        ),
        ("structured_outputs.choice", "non-empty", {"structured_outputs": {"choice": []}}),
        ("structured_outputs.choice[0]", "a string", {"structured_outputs": {"choice": [1]}}),
        ("structured_outputs.json", "object", {"structured_outputs": {"json": "[]"}}),
        ("guided_regex", "only one", {"guided_json": SCHEMA, "guided_regex": "a"}),
        ("guided_json", "only one", {"response_format": {"type": "json_object"}, "guided_json": SCHEMA}),
        ("guided_regex", "16384", {"guided_regex": "a" * 17000}),
    ],
)  # fmt: skip
def test_what_makes_no_sense_names_its_field(tmp_path: Path, field: str, word: str, body: dict[str, Any]) -> None:
    for path in (TEXT, CHAT):
        error = refused(tmp_path, path, **body)
        assert error["param"] == field, error
        assert word in error["message"], error


def test_what_a_coordinator_says_of_a_grammar_is_said_of_its_field(tmp_path: Path) -> None:
    for after in ([], [70, 71]):
        coordinator = ScriptedCoordinator(failing(STATUS_INVALID, "grammar: it is too odd", after))
        front = make_front(tmp_path, coordinator)
        error = post(front, TEXT, prompt="p", guided_regex="a").json()["error"]
        assert error["param"] == "guided_regex"
        assert error["message"] == "Invalid value for 'guided_regex': it is too odd."
    answer = post(front, CHAT, messages=HELLO, guided_regex="a", stream=True)
    *_, last, done, _ = answer.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["param"] == "guided_regex"
    assert done == "data: [DONE]"
    other = ScriptedCoordinator(failing(STATUS_INVALID, "prompt_token_ids is empty"))
    error = post(make_front(tmp_path, other), TEXT, prompt="p", guided_regex="a").json()["error"]
    assert error["param"] is None
