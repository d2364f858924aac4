"""The OpenAPI document: every route, every status, and schemas that real requests and answers keep to."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import pytest
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.front.answer_schemas import ANSWERS
from actors.front.http_app import ENDPOINTS, create_app
from actors.front.openapi import openapi_document
from actors.front.routes import ROUTES, Route
from protos.expert_pb2 import (
    STATUS_DEADLINE_EXCEEDED,
    STATUS_DRAINING,
    STATUS_INTERNAL,
    STATUS_INVALID,
    STATUS_OVERLOADED,
)
from tests.support.front import MODEL, VOCAB, ask, make_front
from tests.support.scripted_coordinator import ScriptedCoordinator, failing, saying
from tests.support.tokenizers import EOS_ID, write_byte_tokenizer

DOCUMENT = openapi_document("1.2.3", MODEL)
HELLO = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path, VOCAB)
    return path


def schema_of(name: str) -> dict[str, Any]:
    """The schema with all others beside it, so that references resolve."""
    return {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}


def check(value: object, name: str) -> None:
    jsonschema.Draft202012Validator(schema_of(name)).validate(value)


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_the_table_is_what_the_application_routes(model_dir: Path) -> None:
    app = create_app(make_front(model_dir, ScriptedCoordinator(saying([7]))))
    routed = {
        (route.path.replace(":path}", "}"), method)
        for route in app.routes
        if isinstance(route, APIRoute) and route.include_in_schema  # all but the dashboard, which is no API
        for method in route.methods or ()
    }
    assert {(route.path, route.method) for route in ROUTES} == routed
    assert len(ROUTES) == len(routed)


def test_every_path_but_those_with_parameters_has_series_of_its_own() -> None:
    of_page = {"/dashboard", "/dashboard/events"}
    assert set(ENDPOINTS) == {route.path for route in ROUTES if not route.parameters} | of_page
    assert [path for path, bounded in ENDPOINTS.items() if bounded] == [TEXT, CHAT, "/tokenize", "/detokenize"]


def test_the_document_is_whole() -> None:
    assert DOCUMENT["openapi"].startswith("3.1")
    assert DOCUMENT["info"]["version"] == "1.2.3"
    schemas = DOCUMENT["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert {reference.removeprefix("#/components/schemas/") for reference in references(DOCUMENT)} <= set(schemas)
    operations = [one for path in DOCUMENT["paths"].values() for one in path.values()]
    assert len({one["operationId"] for one in operations}) == len(operations) == len(ROUTES)
    for one in operations:
        assert {"200", "404", "405", "429", "500", "503"} <= set(one["responses"])
    json.dumps(DOCUMENT, allow_nan=False)


def test_it_is_served(model_dir: Path) -> None:
    front = make_front(model_dir, ScriptedCoordinator(saying([7])))
    served = ask(front, lambda client: client.get("/openapi.json")).json()
    assert served["paths"] == json.loads(json.dumps(DOCUMENT["paths"]))
    check(served, "Description")


ANSWERED: list[tuple[str, str, dict[str, Any] | None, str]] = [
    ("POST", TEXT, {"prompt": "p"}, "Completion"),
    (
        "POST",
        TEXT,
        {"prompt": ["a", "b"], "echo": True, "logprobs": 2, "prompt_logprobs": 1, "return_token_ids": True, "n": 2},
        "Completion",
    ),
    ("POST", CHAT, {"messages": HELLO}, "ChatCompletion"),
    (
        "POST",
        CHAT,
        {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 0, "return_token_ids": True},
        "ChatCompletion",
    ),
    ("GET", "/v1/models", None, "ModelList"),
    ("GET", f"/v1/models/{MODEL}", None, "Model"),
    ("POST", "/tokenize", {"prompt": "hi", "return_token_strs": True}, "Tokens"),
    ("POST", "/tokenize", {"messages": HELLO}, "Tokens"),
    ("POST", "/detokenize", {"tokens": [1, 70]}, "Text"),
    ("GET", "/tokenizer_info", None, "TokenizerInfo"),
    ("GET", "/health", None, "Health"),
    ("GET", "/ping", None, "Health"),
    ("GET", "/load", None, "Load"),
    ("GET", "/version", None, "Version"),
]


@pytest.mark.parametrize(("method", "path", "body", "name"), ANSWERED, ids=lambda value: str(value)[:30])
def test_answers_keep_to_their_schemas(
    model_dir: Path, method: str, path: str, body: dict[str, Any] | None, name: str
) -> None:
    front = make_front(model_dir, ScriptedCoordinator(saying([70, 71], EOS_ID)))
    sent = None if body is None else {"model": MODEL, **body}
    response = ask(front, lambda client: client.request(method, path, json=sent))
    assert response.status_code == 200, response.text
    check(response.json(), name)
    with pytest.raises(jsonschema.ValidationError):
        check({}, name)


@pytest.mark.parametrize(("path", "name"), [(TEXT, "Completion"), (CHAT, "ChatCompletionChunk")])
@pytest.mark.parametrize(
    "usage", [None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
)
def test_events_keep_to_their_schemas(model_dir: Path, path: str, name: str, usage: dict[str, bool] | None) -> None:
    front = make_front(model_dir, ScriptedCoordinator(saying([70, 71], EOS_ID)))
    more: dict[str, Any] = {"prompt": "p"} if path == TEXT else {"messages": HELLO}
    body = {"model": MODEL, "stream": True, "stream_options": usage, "return_token_ids": True, **more}
    response = ask(front, lambda client: client.post(path, json=body))
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert len(events) >= 3
    for event in events:
        check(event, name)


FAILURES = [
    (failing(STATUS_INVALID, "wrong"), 400),
    (failing(STATUS_OVERLOADED, "full"), 429),
    (failing(STATUS_INTERNAL, "broken"), 500),
    (failing(STATUS_DRAINING, "draining"), 503),
    (failing(STATUS_DEADLINE_EXCEEDED, "late"), 504),
]


@pytest.mark.parametrize(("script", "status"), FAILURES, ids=[str(status) for _, status in FAILURES])
@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_every_failure_is_declared_and_keeps_to_the_schema(
    model_dir: Path, script: Any, status: int, path: str
) -> None:
    front = make_front(model_dir, ScriptedCoordinator(script))
    body = {"model": MODEL, "prompt": "p", "messages": HELLO}
    response = ask(front, lambda client: client.post(path, json=body))
    assert response.status_code == status
    assert str(status) in DOCUMENT["paths"][path]["post"]["responses"]
    check(response.json(), "Error")


def test_refusals_before_any_work_are_declared(model_dir: Path) -> None:
    front = make_front(model_dir, ScriptedCoordinator(saying([7])))

    async def use(client: httpx2.AsyncClient) -> None:
        for route in ROUTES:
            path = route.path.replace("{model_id}", "other")
            declared = DOCUMENT["paths"][route.path][route.method.lower()]["responses"]
            tries = [await client.request("DELETE", path)]
            if route.parameters:
                tries.append(await client.get(path))
            if route.request is not None:
                json_type = {"content-type": "application/json"}
                tries.append(await client.post(path, content=b"{", headers=json_type))
                tries.append(await client.post(path, content=b"{}", headers=json_type))
                tries.append(await client.post(path, content=b"{}", headers={"content-type": "text/csv"}))
                tries.append(await client.post(path, content=b" " * (17 << 20), headers=json_type))
            for response in tries:
                assert response.status_code >= 400
                assert str(response.status_code) in declared, (path, response.status_code)
                check(response.json(), "Error")

    ask(front, use)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 400) | st.floats(-200, 200, width=32) | st.text("ab5 ", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab5", max_size=4), inner, max_size=3),
    max_leaves=5,
)
REQUESTS = [route.request for route in ROUTES if route.request is not None]
FIELDS = sorted({field for model in REQUESTS for field in model.model_fields} - {"asked_in_vain"})


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4))
def test_what_the_schema_refuses_the_server_refuses_too(values: dict[str, Any]) -> None:
    """Not the other way round: some rules are about several fields, or about the model."""
    needed = {"model": MODEL, "prompt": "p", "messages": HELLO, "tokens": [1]}
    for model in REQUESTS:
        fields = {name: value for name, value in {**needed, **values}.items() if name in model.model_fields}
        if model.__name__ == "TokenizeRequest":
            fields.pop("messages" if values.get("messages") is None else "prompt")
        try:
            model.model_validate(json.loads(json.dumps(fields)))
        except ValidationError:
            continue
        check(fields, model.__name__)


def test_a_request_with_every_field_is_valid_by_both() -> None:
    body: dict[str, Any] = {
        "model": MODEL, "messages": [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}],
        "stop": ["a", "b"], "stop_token_ids": [1], "n": 2, "seed": 2**63, "logit_bias": {"5": 1.5}, "bad_words": ["x"],
        "allowed_token_ids": [1], "prompt_logprobs": 1, "top_logprobs": 2, "logprobs": True, "truncation_side": "left",
        "truncate_prompt_tokens": 5, "priority": -1, "cache_salt": "s", "request_id": "r", "user": "u",
        "continue_final_message": True, "chat_template_kwargs": {"a": [1]}, "max_completion_tokens": 4,
    }  # fmt: skip
    check(body, "ChatCompletionRequest")
    (model,) = [one for one in REQUESTS if one.__name__ == "ChatCompletionRequest"]
    model.model_validate(body)
    with pytest.raises(jsonschema.ValidationError):
        check({**body, "logit_bias": {"x": 1}}, "ChatCompletionRequest")
    with pytest.raises(jsonschema.ValidationError):
        check({**body, "messages": [{"role": "robot", "content": "x"}]}, "ChatCompletionRequest")


def test_no_answer_is_described_that_nothing_gives() -> None:
    used = {reference.removeprefix("#/components/schemas/") for reference in references(DOCUMENT)}
    assert set(ANSWERS) <= used | {"ChatCompletionChunk"}


@pytest.mark.parametrize("route", [route for route in ROUTES if route.events], ids=lambda route: route.path)
def test_examples_are_served_and_their_events_keep_to_their_schema(model_dir: Path, route: Route) -> None:
    operation = DOCUMENT["paths"][route.path]["post"]
    example = operation["requestBody"]["content"]["application/json"]["examples"]["streamed"]["value"]
    front = make_front(model_dir, ScriptedCoordinator(saying([70, 71], EOS_ID)))
    response = ask(front, lambda client: client.post(route.path, json=example))
    assert response.headers["content-type"].startswith("text/event-stream")
    schema = operation["responses"]["200"]["content"]["text/event-stream"]["schema"]
    blocks = response.text.strip().split("\n\n")
    events = [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]
    for event in events:
        jsonschema.Draft202012Validator(schema).validate(event)
    *chunks, last = [event["data"] for event in events]
    assert last == "[DONE]"
    assert chunks
    for chunk in chunks:
        check(json.loads(chunk), str(route.events))
