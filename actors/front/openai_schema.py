"""What a client may ask for: the request bodies of /v1/completions and /v1/chat/completions.

Names and meanings are OpenAI's, and vLLM's where OpenAI's end. Unknown fields are accepted and ignored;
fields that we know and cannot honour are refused, never ignored. What depends on the model (its context, its
vocabulary) is checked by `actors.front.generation`.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 64
MAX_N = 128
MAX_LOGPROBS = 20
MAX_PROMPTS = 128
MAX_MESSAGES = 4096
COMPLETIONS_DEFAULT_MAX_TOKENS = 16
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

Prompt = str | list[int]


def _wrong(param: str, message: str) -> PydanticCustomError:
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


def _content(value: object) -> object:
    """A message's text: a string, null, or an array of text parts, which are joined by line ends."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or an array of content parts")
    texts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(value) or not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError("content", "only content parts of the type 'text' are supported")
    return "\n".join(str(text) for text in texts)


def _role(value: object) -> object:
    if not isinstance(value, str) or value not in ROLES:
        raise PydanticCustomError("role", f"must be one of {', '.join(ROLES)}")
    return "system" if value == "developer" else value


class Body(BaseModel):
    """Strict types (a number is not a string), finite numbers, unknown fields ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(Body):
    """What both endpoints share. None means the default in the comment, as a missing field does."""

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None  # 0
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None  # 1
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None  # 1
    top_k: Annotated[int, Field(ge=-1)] | None = None  # 0 and -1: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None  # 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None  # drawn
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None  # 1
    stop: Annotated[list[str], BeforeValidator(_stops)] = Field(default_factory=list)
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None  # true
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None  # 1
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None  # 0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None  # 0
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: str | None = None
    logit_bias: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options", "it needs 'stream' to be true")
        return self

    def unsupported_fields(self) -> dict[str, str]:
        """Fields whose value asks for what this server does not do, with the reason."""
        return {"logit_bias": "is not supported by this server."} if self.logit_bias else {}

    @property
    def num_choices(self) -> int:
        """Choices per prompt."""
        return self.n or 1

    @property
    def wants_usage_chunk(self) -> bool:
        """True when a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_usage_always(self) -> bool:
        """True when every chunk of a stream carries the usage so far."""
        return self.wants_usage_chunk and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[list[Prompt], BeforeValidator(_prompts)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: str | None = None
    best_of: int | None = None

    def unsupported_fields(self) -> dict[str, str]:
        """As in the base, and `suffix` and a `best_of` that differs from `n`."""
        refused = super().unsupported_fields()
        if self.suffix:
            refused["suffix"] = "is not supported: this model does not fill in."
        if self.best_of is not None and self.best_of != self.num_choices:
            refused["best_of"] = "is supported only where it equals 'n'."
        return refused


class ChatMessage(BaseModel):
    """One message. Fields beyond these reach the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    role: Annotated[str, BeforeValidator(_role)]
    content: Annotated[str | None, BeforeValidator(_content)] = None

    @model_validator(mode="after")
    def _only_an_assistant_may_be_silent(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise _wrong("content", "a message needs it unless its role is 'assistant'")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: a silent assistant says the empty string."""
        return {**self.model_dump(), "content": self.content or ""}


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None  # true
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    modalities: list[Any] | None = None

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise _wrong("top_logprobs", "it needs 'logprobs' to be true")
        return self

    def unsupported_fields(self) -> dict[str, str]:
        """As in the base, and tools, formats and modalities other than text."""
        refused = super().unsupported_fields()
        if self.response_format and self.response_format.get("type") != "text":
            refused["response_format"] = "is supported only with the type 'text'."
        if self.modalities and self.modalities != ["text"]:
            refused["modalities"] = "is supported only as ['text']."
        if self.tools:
            refused["tools"] = "is not supported by this server."
        if self.functions:
            refused["functions"] = "is not supported by this server."
        return refused
