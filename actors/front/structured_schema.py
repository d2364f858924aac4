"""The request fields that say what form an answer must have, in OpenAI's words and in vLLM's, older ones included.

What they ask of the model is `actors.front.structured`'s to say.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

JsonSchema = dict[str, Any] | str
Choices = list[str]
MAX_NAME_CHARS = 64
Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS, pattern="^[a-zA-Z0-9_-]+$")]


class _Part(BaseModel):
    """Strict types, unknown fields ignored, as in `actors.front.openai_schema`."""

    model_config = ConfigDict(
        extra="ignore", strict=True, allow_inf_nan=False, frozen=True, serialize_by_alias=True, populate_by_name=True
    )


class NamedSchema(_Part):
    """OpenAI's `json_schema`. `strict` or not, it is enforced."""

    name: Name
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")  # any object
    strict: bool | None = None


class ResponseFormat(_Part):
    """OpenAI's `response_format`."""

    type: str
    json_schema: NamedSchema | None = None


class StructuredOutputs(_Part):
    """vLLM's `structured_outputs`: exactly one of the first five."""

    json_schema: JsonSchema | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    structural_tag: Any = None
