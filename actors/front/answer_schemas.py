"""JSON Schema of everything that the front door answers, by name, for its OpenAPI document.

Tests hold real answers to them. What fills them is `actors.front.openai_responses`' and the endpoints' work.
"""

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]

_STRING: Json = {"type": "string"}
_INTEGER: Json = {"type": "integer"}
_NUMBER: Json = {"type": "number"}
_COUNT: Json = {"type": "integer", "minimum": 0}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _array(items: Json) -> Json:
    return {"type": "array", "items": items}


def _map(values: Json) -> Json:
    return {"type": "object", "additionalProperties": values}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: Mapping[str, Json], optional: Mapping[str, Json] | None = None) -> Json:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def _const(value: str) -> Json:
    return {"const": value}


_FINISH: Json = _or_null({"type": "string"})
_STOP: Json = {"type": ["string", "integer", "null"]}
_IDS = _array(_COUNT)
_SCORES = _array(_or_null(_map(_ref("TokenScore"))))
_HEAD: Json = {"id": _STRING, "created": _INTEGER, "model": _STRING, "system_fingerprint": _STRING}
_ENDED: Json = {"finish_reason": _FINISH, "stop_reason": _STOP}
_CHAT_EXTRAS: Json = {"token_ids": _IDS, "routed_experts": _or_null(_STRING)}

ANSWERS: Mapping[str, Json] = {
    "Error": _object(
        {
            "error": _object(
                {"message": _STRING, "type": _STRING, "param": _or_null(_STRING), "code": _or_null(_STRING)},
            )
        }
    ),
    "TextPart": _object({"type": _const("text"), "text": _STRING}),
    "Usage": _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT}),
    "TokenScore": _object({"logprob": _NUMBER, "rank": _INTEGER, "decoded_token": _STRING}),
    "TextLogprobs": _object(
        {
            "tokens": _array(_STRING),
            "token_logprobs": _array(_or_null(_NUMBER)),
            "top_logprobs": _array(_or_null(_map(_NUMBER))),
            "text_offset": _array(_COUNT),
        }
    ),
    "ChatToken": _object(
        {"token": _STRING, "logprob": _NUMBER, "bytes": _array({"type": "integer", "minimum": 0, "maximum": 255})},
        {"top_logprobs": _array(_ref("ChatToken"))},
    ),
    "ChatLogprobs": _object({"content": _or_null(_array(_ref("ChatToken"))), "refusal": {"type": "null"}}),
    "Completion": _object(
        {
            **_HEAD,
            "object": _const("text_completion"),
            "choices": _array(
                _object(
                    {"index": _COUNT, "text": _STRING, "logprobs": _or_null(_ref("TextLogprobs")), **_ENDED},
                    {**_CHAT_EXTRAS, "prompt_token_ids": _IDS, "prompt_logprobs": _SCORES},
                )
            ),
        },
        {"usage": _or_null(_ref("Usage"))},
    ),
    "ChatCompletion": _object(
        {
            **_HEAD,
            "object": _const("chat.completion"),
            "choices": _array(
                _object(
                    {
                        "index": _COUNT,
                        "message": _object({"role": _const("assistant"), "content": _or_null(_STRING)}),
                        "logprobs": _or_null(_ref("ChatLogprobs")),
                        **_ENDED,
                    },
                    _CHAT_EXTRAS,
                )
            ),
            "usage": _ref("Usage"),
        },
        {"prompt_token_ids": _IDS, "prompt_logprobs": _SCORES},
    ),
    "ChatCompletionChunk": _object(
        {
            **_HEAD,
            "object": _const("chat.completion.chunk"),
            "choices": _array(
                _object(
                    {
                        "index": _COUNT,
                        "delta": _object({}, {"role": _const("assistant"), "content": _or_null(_STRING)}),
                        "logprobs": _or_null(_ref("ChatLogprobs")),
                        "finish_reason": _FINISH,
                    },
                    {"stop_reason": _STOP, "token_ids": _IDS},
                )
            ),
        },
        {"usage": _or_null(_ref("Usage")), "prompt_token_ids": _IDS},
    ),
    "Model": _object(
        {
            "id": _STRING,
            "object": _const("model"),
            "created": _INTEGER,
            "owned_by": _STRING,
            "max_model_len": {"type": "integer", "minimum": 1},
        }
    ),
    "ModelList": _object({"object": _const("list"), "data": _array(_ref("Model"))}),
    "Tokens": _object(
        {"count": _COUNT, "max_model_len": _COUNT, "tokens": _IDS, "token_strs": _or_null(_array(_STRING))}
    ),
    "Text": _object({"prompt": _STRING}),
    "TokenizerInfo": _object(
        {"tokenizer_class": _STRING, "eos_token": _or_null(_STRING), "bos_token": _or_null(_STRING)},
        {"chat_template": {}},
    ),
    "Health": _object({"status": _const("ok")}),
    "Metrics": _STRING,
    "Load": _object({"server_load": _COUNT}),
    "Version": _object({"version": _STRING}),
    "Description": _object({"openapi": _STRING, "info": {"type": "object"}, "paths": {"type": "object"}}),
}
