"""The request fields that are more than a number: what each may be, and its limits. Each check names what is wrong.

The request bodies made of them are `actors.front.openai_schema`'s; what depends on the model is checked by
`actors.front.planning`.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 64
MAX_PROMPTS = 128
MAX_BIASED_TOKENS = 1024
MAX_BIAS = 100
MAX_ALLOWED_TOKENS = 16_384
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_SALT_BYTES = 256
MAX_PRIORITY = 1000
"""Priorities are from minus to plus this."""
MAX_TEMPLATE_KWARGS_CHARS = 65_536
MAX_REQUEST_ID_CHARS = 64
_MAX_TOKEN_ID = 2**31 - 1

REQUEST_ID = re.compile(rf"[A-Za-z0-9._:=/+-]{{1,{MAX_REQUEST_ID_CHARS}}}")
_TOKEN_ID_TEXT = re.compile(r"0|[1-9][0-9]{0,9}")

Prompt = str | list[int]


def wrong(param: str, message: str) -> PydanticCustomError:
    """A finding about the whole request that is `param`'s fault."""
    return PydanticCustomError("request", "{message}", {"message": message, "param": param})


def _stops(value: object) -> object:
    """A string, an array of strings or null, as a list."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop", "must be a string or an array of strings")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("stop", f"must have at most {MAX_STOPS} strings, not {len(stops)}")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise PydanticCustomError("stop", f"each string must have 1 to {MAX_STOP_CHARS} characters")
    return stops


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


def _prompts(value: object) -> object:
    """The four forms of a completions prompt, as a list of prompts: text, texts, token ids, lists of token ids."""
    if isinstance(value, str) or _is_token_ids(value):
        return [value]
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("prompt", "must be a string or a non-empty array of strings, token ids or both")
    if len(value) > MAX_PROMPTS and not isinstance(value[0], int):
        raise PydanticCustomError("prompt", f"must have at most {MAX_PROMPTS} prompts, not {len(value)}")
    if not all(isinstance(item, str) or _is_token_ids(item) for item in value):
        raise PydanticCustomError("prompt", "each must be a string or a non-empty array of non-negative token ids")
    return value


def _logit_bias(value: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's map of token ids, as strings, to numbers."""
    if len(value) > MAX_BIASED_TOKENS:
        raise PydanticCustomError("bias", f"must have at most {MAX_BIASED_TOKENS} tokens, not {len(value)}")
    for token, bias in value.items():
        if not _TOKEN_ID_TEXT.fullmatch(token) or int(token) > _MAX_TOKEN_ID:
            raise PydanticCustomError("bias", "each key must be a token id, written in decimal digits")
        if type(bias) not in (int, float) or not math.isfinite(bias) or abs(bias) > MAX_BIAS:
            raise PydanticCustomError("bias", f"each bias must be a number from -{MAX_BIAS} to {MAX_BIAS}")
    return value


def _bad_words(value: list[str]) -> list[str]:
    if not all(0 < len(word) <= MAX_BAD_WORD_CHARS for word in value):
        raise PydanticCustomError("bad_words", f"each must have 1 to {MAX_BAD_WORD_CHARS} characters")
    return list(dict.fromkeys(value))


def _template_kwargs(value: dict[str, Any]) -> dict[str, Any]:
    try:
        size = len(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError):
        raise PydanticCustomError("kwargs", "must be plain JSON that is not nested deeply") from None
    if size > MAX_TEMPLATE_KWARGS_CHARS:
        limit = MAX_TEMPLATE_KWARGS_CHARS
        raise PydanticCustomError("kwargs", f"must have at most {limit} characters as JSON, not {size}")
    return value


def _salt(value: str) -> str:
    if not 0 < len(value.encode()) <= MAX_SALT_BYTES:
        raise PydanticCustomError("cache_salt", f"must have 1 to {MAX_SALT_BYTES} bytes in UTF-8")
    return value


def _request_id(value: str) -> str:
    if not REQUEST_ID.fullmatch(value):
        reason = f"must have 1 to {MAX_REQUEST_ID_CHARS} letters, digits and characters of . _ : = / + -"
        raise PydanticCustomError("request_id", reason)
    return value


TokenId = Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]

Stops = Annotated[
    list[str],
    BeforeValidator(_stops),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                {
                    "type": "array",
                    "maxItems": MAX_STOPS,
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                },
                {"type": "null"},
            ],
            "default": None,
        }
    ),
]

_IDS_SCHEMA: Mapping[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
Prompts = Annotated[
    list[Prompt],
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": {"type": "string"}},
                _IDS_SCHEMA,
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _IDS_SCHEMA},
            ]
        }
    ),
]

LogitBias = Annotated[
    dict[str, Any],
    AfterValidator(_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
            "maxProperties": MAX_BIASED_TOKENS,
            "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
        }
    ),
]

BadWords = Annotated[
    list[Annotated[str, Field(json_schema_extra={"minLength": 1, "maxLength": MAX_BAD_WORD_CHARS})]],
    Field(max_length=MAX_BAD_WORDS),
    AfterValidator(_bad_words),
]
AllowedTokens = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_TOKENS)]
StopTokens = Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)]
CacheSalt = Annotated[
    str, AfterValidator(_salt), Field(json_schema_extra={"minLength": 1, "maxLength": MAX_SALT_BYTES})
]
Priority = Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
TemplateKwargs = Annotated[dict[str, Any], AfterValidator(_template_kwargs)]
RequestIdText = Annotated[
    str, AfterValidator(_request_id), Field(json_schema_extra={"pattern": f"^{REQUEST_ID.pattern}$"})
]


def _is_unset(value: object) -> bool:
    """Null, false, nothing: what says the same as leaving the field out."""
    return value is None or value is False or value == [] or value == {} or value == ""


# What vLLM and OpenAI know and this server cannot do, with the values that ask for nothing and the reason.
REFUSED_EVERYWHERE: Mapping[str, tuple[tuple[object, ...], str]] = {
    "use_beam_search": ((), "is not supported: this server samples."),
    "prompt_embeds": ((), "is not supported: send text or token ids."),
    "logprob_token_ids": ((), "is not supported; 'logprobs' gives the most likely tokens."),
    "thinking_token_budget": ((-1,), "is not supported by this server."),
    "repetition_detection": ((), "is not supported by this server."),
    "watermarking": ((), "is not supported by this server."),
    "kv_transfer_params": ((), "is not supported by this server."),
    "ec_transfer_params": ((), "is not supported by this server."),
    "vllm_xargs": ((), "is not supported by this server."),
    "routed_experts_prompt_start": ((0,), "is supported only as 0."),
    "stream_interval": ((1,), "is supported only as 1."),
}
REFUSED_IN_CHAT: Mapping[str, tuple[tuple[object, ...], str]] = {
    "echo": ((), "is not supported for chats."),
    "documents": ((), "is not supported by this server."),
    "chat_template": ((), "is not accepted from requests: the checkpoint's own is used."),
    "media_io_kwargs": ((), "is not supported: this model reads text only."),
    "mm_processor_kwargs": ((), "is not supported: this model reads text only."),
    "return_prompt_text": ((), "is not supported; 'return_token_ids' gives the prompt's tokens."),
    "audio": ((), "is not supported: this model writes text only."),
    "web_search_options": ((), "is not supported by this server."),
}


def refused(fields: Mapping[str, Any], table: Mapping[str, tuple[tuple[object, ...], str]]) -> dict[str, str]:
    """The fields of `table` whose value in `fields` asks for something, with the reason."""
    found: dict[str, str] = {}
    for name in sorted(table.keys() & fields.keys()):
        harmless, reason = table[name]
        if not _is_unset(fields[name]) and not any(_same(fields[name], one) for one in harmless):
            found[name] = reason
    return found


def _same(value: object, harmless: object) -> bool:
    """Equal and of one type: 1 is not true."""
    return type(value) is type(harmless) and value == harmless
