"""What the front door tells of itself at /openapi.json: an OpenAPI 3.1 document made of the table of routes.

Requests are described by the very models that validate them; answers, which are plain dictionaries, by
`actors.front.answer_schemas`.
"""

import functools
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from actors.front.answer_schemas import ANSWERS
from actors.front.openai_schema import ROLES
from actors.front.request_fields import REQUEST_ID
from actors.front.routes import ROUTES, Route

Json = dict[str, Any]

_REASONS = {
    400: "The request is wrong; `param` names the field",
    401: "No API key, or a wrong one, where the server has keys",
    404: "No such path, or no such model",
    405: "The path has other methods",
    408: "The body did not arrive in time",
    409: "The stream to go on with is of another request or model",
    410: "The stream to go on with is too old",
    413: "The body is too large",
    414: "The URL is too long",
    415: "The body is not JSON",
    429: "As many requests as are taken, or as the key may make; see Retry-After",
    431: "The headers are too many or too large",
    500: "A defect of the server",
    503: "Not ready; see Retry-After",
    504: "The answer was not done in time",
}
_REQUEST_ID_HEADER = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "A name for the request; the answer's id and header repeat it.",
    "schema": {"type": "string", "pattern": f"^{REQUEST_ID.pattern}$"},
}
_LAST_EVENT_ID_HEADER = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "Where a stream that was cut goes on: the id of the last event that arrived.",
    "schema": {"type": "string", "maxLength": 2048},
}
_PARTS = {"type": "array", "items": {"$ref": "#/components/schemas/TextPart"}}


@functools.cache
def openapi_document(version: str, model_id: str) -> Json:
    """The document, its examples with the model that is served; the same object for every call, not to be changed."""
    paths: Json = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, model_id)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Octavo",
            "version": version,
            "description": "OpenAI's completions and chats, with vLLM's extensions. Unknown fields are ignored.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": {**_requests(), **ANSWERS}},
    }


def _requests() -> Json:
    models: list[type[BaseModel]] = [route.request for route in ROUTES if route.request is not None]
    _, schema = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    found: Json = schema["$defs"]
    message = found["ChatMessage"]["properties"]
    message["role"] = {"type": "string", "enum": list(ROLES)}
    message["content"] = {"anyOf": [{"type": "string"}, _PARTS, {"type": "null"}]}
    return found


def _operation(route: Route, model_id: str) -> Json:
    operation: Json = {
        "operationId": _operation_id(route),
        "summary": route.summary,
        "parameters": list(_parameters(route)),
        "responses": {"200": _answer(route), **{str(status): _error(status) for status in route.errors}},
    }
    if route.request is not None:
        schema = {"$ref": f"#/components/schemas/{route.request.__name__}"}
        content: Json = {"schema": schema}
        if route.example is not None:
            example = {"model": model_id, **route.example}
            content["examples"] = {"whole": {"value": example}, "streamed": {"value": {**example, "stream": True}}}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    return operation


def _operation_id(route: Route) -> str:
    words = route.path.replace("{", "").replace("}", "").replace(".", "/").split("/")
    return "_".join([route.method.lower(), *filter(None, words)])


def _parameters(route: Route) -> Iterable[Json]:
    for name in route.parameters:
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    yield _REQUEST_ID_HEADER
    if route.events is not None:
        yield _LAST_EVENT_ID_HEADER


def _answer(route: Route) -> Json:
    content: Json = {route.media_type: {"schema": {"$ref": f"#/components/schemas/{route.answer}"}}}
    if route.events is not None:
        content["text/event-stream"] = {"schema": _event(route.events)}
    return {"description": "The answer", "headers": _headers(200), "content": content}


def _event(data: str) -> Json:
    # Before OpenAPI 3.2, which has `itemSchema` for it, the schema of a stream is read as that of each event.
    said = f"A JSON object of the schema {data}, or Error where the stream breaks off; the last event's is [DONE]."
    return {
        "type": "object",
        "description": "One server-sent event of the stream",
        "required": ["data"],
        "properties": {
            "id": {"type": "string", "description": "What Last-Event-ID names to go on after this event"},
            "data": {"type": "string", "description": said},
        },
    }


def _error(status: int) -> Json:
    schema = {"$ref": "#/components/schemas/Error"}
    return {
        "description": _REASONS[status],
        "headers": _headers(status),
        "content": {"application/json": {"schema": schema}},
    }


def _headers(status: int) -> Json:
    headers: Json = {"X-Request-Id": {"schema": {"type": "string"}}}
    if status in (429, 503):
        headers["Retry-After"] = {"schema": {"type": "string", "pattern": "^[0-9]+$"}}
    return headers
