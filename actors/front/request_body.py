"""Reads a JSON request body: within a size and a time, as JSON, into a request model. Every failure is an ApiError."""

import asyncio
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from actors.front.body_ahead import body_of
from actors.front.front_door import FrontLimits
from actors.front.openai_errors import ApiError, body_too_large, from_validation, invalid
from actors.front.openai_schema import Body

Model = TypeVar("Model", bound=Body)

MAX_DEPTH = 201
"""Arrays and objects in one another: the parser's own bound."""


async def read_request(request: Request, model: type[Model], limits: FrontLimits) -> Model:
    """The validated body. Raises ApiError 400, 408, 413 or 415, and ClientDisconnect when the client left."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "The request must have the Content-Type 'application/json'.", code="unsupported_media_type")
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            body = await _read(request, limits.max_body_bytes)
    except TimeoutError:
        raise ApiError(408, "The request body did not arrive in time.", type="timeout_error") from None
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise _unreadable(error) from None
    if not isinstance(value, dict):
        raise invalid(None, "The JSON body of your request must be an object.", None)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_validation(error) from None


async def _read(request: Request, limit: int) -> bytes:
    """The body; stops reading as soon as it is over the limit, whatever its Content-Length claims."""
    claimed = request.headers.get("content-length", "0")
    if claimed.isdigit() and int(claimed[:20]) > limit:
        raise body_too_large(limit)
    ahead = body_of(request.scope)
    if ahead is not None:
        return ahead
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise body_too_large(limit)
    return bytes(body)


def _unreadable(error: ValueError) -> ApiError:
    """The parser's complaint; it names a position, never the text."""
    reason = str(error).splitlines()[0]
    if reason.startswith("recursion limit exceeded"):
        return invalid(None, f"The JSON body of your request is nested deeper than {MAX_DEPTH} levels.", "too_deep")
    return invalid(None, f"We could not parse the JSON body of your request: {reason}.", None)
