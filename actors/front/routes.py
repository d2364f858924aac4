"""All routes of the front door as a table: what is asked, what is answered, and every status that may come.

`actors.front.http_app` adds the handlers, and a test holds the two together. Who may use a route, and how it is
described to clients (`actors.front.openapi`), is read from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from actors.front.openai_schema import Body, ChatCompletionRequest, CompletionRequest
from actors.front.tokenize_schema import DetokenizeRequest, TokenizeRequest

# What any route may answer: a key that is wrong, a path or method that is none, a head that is too large, a defect, and
# a server that is too busy for anything.
_ALWAYS = (401, 404, 405, 414, 429, 431, 500, 503)
_BODY = (400, 408, 413, 415)
_GENERATION = (409, 410, 504)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One path and method. `answer` names the schema of status 200, `media_type` its kind, None for none.

    `is_bounded`: only so many of its requests are served at once. `events`: with `stream` true the answer is a
    sequence of server-sent events, each the schema it names. `example`: a request that may be made of any model.
    """

    path: str
    method: Literal["GET", "POST"] = "GET"
    summary: str
    answer: str
    media_type: str = "application/json"
    request: type[Body] | None = None
    events: str | None = None
    example: Mapping[str, object] | None = None
    is_bounded: bool = False
    parameters: tuple[str, ...] = field(default=())

    @property
    def errors(self) -> tuple[int, ...]:
        """Every status but 200 that may be answered, ascending."""
        more = _BODY if self.request is not None else ()
        return tuple(sorted({*_ALWAYS, *more, *(_GENERATION if self.events is not None else ())}))


ROUTES: tuple[Route, ...] = (
    Route(
        path="/v1/completions",
        method="POST",
        summary="Goes on with prompts",
        request=CompletionRequest,
        answer="Completion",
        events="Completion",
        example={"prompt": "The capital of France is", "max_tokens": 8},
        is_bounded=True,
    ),
    Route(
        path="/v1/chat/completions",
        method="POST",
        summary="Answers a conversation",
        request=ChatCompletionRequest,
        answer="ChatCompletion",
        events="ChatCompletionChunk",
        example={"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8},
        is_bounded=True,
    ),
    Route(path="/v1/models", summary="The model that is served", answer="ModelList"),
    Route(path="/v1/models/{model_id}", summary="The same by its name", answer="Model", parameters=("model_id",)),
    Route(
        path="/tokenize",
        method="POST",
        summary="Token ids of a prompt or a conversation",
        request=TokenizeRequest,
        answer="Tokens",
        is_bounded=True,
    ),
    Route(
        path="/detokenize",
        method="POST",
        summary="The text of token ids",
        request=DetokenizeRequest,
        answer="Text",
        is_bounded=True,
    ),
    Route(path="/tokenizer_info", summary="The tokenizer's configuration", answer="TokenizerInfo"),
    Route(path="/health", summary="200 while requests are taken, else 503", answer="Health"),
    Route(path="/ping", summary="As /health", answer="Health"),
    Route(path="/ping", method="POST", summary="As /health", answer="Health"),
    Route(path="/metrics", summary="Prometheus' text format", answer="Metrics", media_type="text/plain"),
    Route(path="/load", summary="Requests being served by this ingress", answer="Load"),
    Route(path="/version", summary="The server's version", answer="Version"),
    Route(path="/openapi.json", summary="This description", answer="Description"),
)
