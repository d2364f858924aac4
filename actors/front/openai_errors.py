"""Errors as an OpenAI client expects them: `{"error": {message, type, param, code}}` with the right status.

Everything that the front door refuses is an `ApiError`; this file also turns pydantic's findings and a
coordinator's status into one. Raising them is left to whoever checks; sending them to `actors.front.http_app` and
`actors.front.streaming`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse

from protos.coordinator_pb2 import SequenceOutput
from protos.expert_pb2 import (
    STATUS_CANCELLED,
    STATUS_DEADLINE_EXCEEDED,
    STATUS_DRAINING,
    STATUS_INVALID,
    STATUS_OVERLOADED,
)

NOT_READY_RETRY_AFTER_S = 2.0
OVERLOADED_RETRY_AFTER_S = 1.0

_INVALID_REQUEST = "invalid_request_error"
_NAMES_OF_TYPES = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
}


@dataclass
class ApiError(Exception):
    """A refusal with its HTTP status. `message` is shown to the client: it names the field and the limit,
    never a prompt.
    """

    status: int
    message: str
    type: str = _INVALID_REQUEST
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The JSON object of the response, or of the event in mid-stream."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole HTTP response."""
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def invalid(param: str | None, message: str, code: str | None = "invalid_value") -> ApiError:
    """400: the value of `param` is wrong, for the reason in `message`."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, reason: str) -> ApiError:
    """400: `param` is known, but this server does not do it. Better refused than silently ignored."""
    return ApiError(400, f"Unsupported parameter: '{param}' {reason}", param=param, code="unsupported_parameter")


def model_not_found(model: str) -> ApiError:
    """404 for a model that is not the one served."""
    message = f"The model `{model[:200]}` does not exist or you do not have access to it."
    return ApiError(404, message, code="model_not_found")


def context_length_exceeded(param: str, limit: int, prompt_tokens: int, max_tokens: int, *, exact: bool) -> ApiError:
    """400 for a prompt that does not fit; `exact` False says that the prompt was only measured from below."""
    least = "" if exact else "at least "
    message = (
        f"This model's maximum context length is {limit} tokens. However, you requested {least}"
        f"{prompt_tokens + max_tokens} tokens ({least}{prompt_tokens} in the {param}, "
        f"{max_tokens} in the completion). Please reduce the length of the {param} or completion."
    )
    return ApiError(400, message, param=param, code="context_length_exceeded")


def body_too_large(limit: int) -> ApiError:
    """413 for a body over the cap."""
    return ApiError(413, f"The request body is larger than {limit} bytes.", code="request_too_large")


def overloaded(retry_after_s: float = OVERLOADED_RETRY_AFTER_S) -> ApiError:
    """429: the bounded queue is full."""
    return ApiError(
        429,
        "The server has as many requests as it takes. Please retry later.",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after_s=retry_after_s,
    )


def not_ready(message: str = "The model is not ready yet. Please retry later.") -> ApiError:
    """503 while starting, draining, or without a coordinator."""
    return ApiError(
        503, message, type="server_error", code="service_unavailable", retry_after_s=NOT_READY_RETRY_AFTER_S
    )


def timed_out(timeout_s: float) -> ApiError:
    """504: the request's deadline passed."""
    return ApiError(
        504, f"The request was not done within {timeout_s:g} s.", type="timeout_error", code="request_timeout"
    )


def internal() -> ApiError:
    """500 that tells nothing about our insides; those are in the log."""
    return ApiError(
        500,
        "The server had an error while processing your request.",
        type="server_error",
        code="internal_error",
    )


def from_output(output: SequenceOutput, timeout_s: float) -> ApiError:
    """What a coordinator's refusal or failure of one request means to the client."""
    match output.status:
        case s if s == STATUS_INVALID:
            return invalid(output.error_field or None, output.error or "The request was refused as invalid.")
        case s if s == STATUS_OVERLOADED:
            return overloaded(output.retry_after_ms / 1000 or OVERLOADED_RETRY_AFTER_S)
        case s if s == STATUS_DEADLINE_EXCEEDED:
            return timed_out(timeout_s)
        case s if s == STATUS_DRAINING:
            return not_ready("The server is shutting down. Please retry later.")
        case s if s == STATUS_CANCELLED:
            return not_ready("The request was cancelled by the server. Please retry.")
    return internal()


def from_validation(error: ValidationError) -> ApiError:
    """The first of pydantic's findings, with the field as OpenAI writes it: `messages[0].content`."""
    details = error.errors(include_url=False, include_input=True)[0]
    blamed = details.get("ctx", {}).get("param")
    param = param_of((*details["loc"], blamed) if blamed else details["loc"])
    if details["type"] == "missing":
        return invalid(param, f"Missing required parameter: '{param}'.", "missing_required_parameter")
    expected = _NAMES_OF_TYPES.get(details["type"])
    if expected is not None:
        got = _name_of(details.get("input"))
        return invalid(
            param, f"Invalid type for '{param}': expected {expected}, but got {got} instead.", "invalid_type"
        )
    return invalid(param, f"Invalid value for '{param}': {_reason(details)}.")


def param_of(location: Sequence[int | str]) -> str:
    """`("messages", 0, "content")` as `messages[0].content`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _reason(details: ErrorDetails) -> str:
    message = details["msg"].rstrip(".").removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _name_of(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a decimal"
        case str():
            return "a string"
        case list():
            return "an array"
    return "an object"
