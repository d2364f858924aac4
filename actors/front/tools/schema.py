"""What a client says about tools, in OpenAI's words: `tools`, `tool_choice`, and calls in a conversation.

What a chat format makes of them is `actors.front.tools.formats`' knowledge.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

MAX_TOOLS = 128
MAX_NAME_CHARS = 64
MAX_TOOLS_BYTES = 128 * 1024
"""Of all tools together, as JSON."""
MAX_CALLS = 128
Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS, pattern="^[a-zA-Z0-9_-]+$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


class Function(_Part):
    """One function: `parameters` is a JSON schema; none is any object."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Part):
    """One tool, which is a function."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it; what only the server needs is left out."""
        return self.model_dump(exclude={"function": {"strict"}}, exclude_none=True)


class FunctionName(_Part):
    """Which function."""

    name: str


class NamedChoice(_Part):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


def _choice(value: object) -> object:
    if value is None or isinstance(value, Mapping) or value in ("none", "auto", "required"):
        return value
    raise PydanticCustomError("tool_choice", "must be none, auto, required or an object that names a function")


def _tools(value: object) -> object:
    if not isinstance(value, list):
        return value
    if len(value) > MAX_TOOLS:
        raise PydanticCustomError("tools", f"must have at most {MAX_TOOLS} tools, not {len(value)}")
    try:
        size = len(json.dumps(value).encode())
    except (ValueError, RecursionError):
        raise PydanticCustomError("tools", "is not JSON, or is nested too deeply") from None
    if size > MAX_TOOLS_BYTES:
        raise PydanticCustomError("tools", f"has {size} bytes, but must have at most {MAX_TOOLS_BYTES}")
    return value


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedChoice | None, BeforeValidator(_choice)]
Tools = Annotated[list[Tool], BeforeValidator(_tools)]


class CalledFunction(_Part):
    """A call in a conversation; `arguments` is the JSON text of an object."""

    name: Name
    arguments: str = Field(default="{}")


class ToolCall(_Part):
    """One call of an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


def calls_for_template(calls: object) -> list[dict[str, Any]]:
    """An assistant's calls with their arguments as objects, which is what chat templates expect.

    Raises ValueError saying what is wrong, or pydantic's ValidationError, which is one.
    """
    if not isinstance(calls, list) or len(calls) > MAX_CALLS:
        raise ValueError(f"must be an array of at most {MAX_CALLS} calls")
    return [_call_for_template(ToolCall.model_validate(call)) for call in calls]


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError("the arguments of a function must be the JSON text of an object")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
