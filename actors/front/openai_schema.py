"""What a client may ask for: the request bodies of /v1/completions and /v1/chat/completions.

Names and meanings are OpenAI's, and vLLM's where OpenAI's end. Unknown fields are accepted and ignored;
fields that we know and cannot honour are refused, never ignored. The larger fields are checked by
`actors.front.request_fields`; what depends on the model (its context, its vocabulary) by `actors.front.planning`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from actors.coordinator.submit_check import MAX_LOGPROBS, MAX_TEMPERATURE, REPETITION_PENALTIES
from actors.front.request_fields import (
    MAX_PROMPTS,
    REFUSED_EVERYWHERE,
    REFUSED_IN_CHAT,
    AllowedTokens,
    BadWords,
    CacheSalt,
    LogitBias,
    Priority,
    Prompt,
    Prompts,
    RequestIdText,
    Stops,
    StopTokens,
    TemplateKwargs,
    refused,
    wrong,
)
from actors.front.structured_schema import Choices, JsonSchema, ResponseFormat, StructuredOutputs
from actors.front.tools.schema import ToolChoice, Tools, calls_for_template

__all__ = [
    "COMPLETIONS_DEFAULT_MAX_TOKENS",
    "MAX_N",
    "MAX_PROMPTS",
    "Body",
    "ChatCompletionRequest",
    "ChatMessage",
    "CompletionRequest",
    "GenerationRequest",
    "Prompt",
    "StreamOptions",
]

MAX_N = 128
MAX_MESSAGES = 4096
COMPLETIONS_DEFAULT_MAX_TOKENS = 16
_LEAST_REPETITION, _MOST_REPETITION = REPETITION_PENALTIES
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


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


def _calls(value: object) -> object:
    """An assistant's calls of tools."""
    if value is None:
        return None
    try:
        return calls_for_template(value) or None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise PydanticCustomError("tool_calls", "{reason}", {"reason": f"{where}: {first['msg']}"}) from None
    except ValueError as error:
        raise PydanticCustomError("tool_calls", "{reason}", {"reason": str(error)}) from None


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

    not_done: ClassVar[Mapping[str, tuple[tuple[object, ...], str]]] = REFUSED_EVERYWHERE

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None  # 0
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = None  # 1
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None  # 1
    top_k: Annotated[int, Field(ge=-1)] | None = None  # 0 and -1: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None  # 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None  # drawn
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None  # 1
    stop: Stops = Field(default_factory=list)
    stop_token_ids: StopTokens | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None  # true
    repetition_penalty: Annotated[float, Field(ge=_LEAST_REPETITION, le=_MOST_REPETITION)] | None = None  # 1
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None  # 0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None  # 0
    logit_bias: LogitBias | None = None
    bad_words: BadWords | None = None
    allowed_token_ids: AllowedTokens | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None  # none; not with 'stream'
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_routed_experts: bool | None = None  # true where the server was started for it and it is no stream
    add_special_tokens: bool | None = None  # for prompts of text true, for chats false
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None  # not; -1: to what fits
    truncation_side: Literal["left", "right"] | None = None  # left: the last tokens stay
    priority: Priority | None = None  # 0; lower comes first
    cache_salt: CacheSalt | None = None
    request_id: RequestIdText | None = None  # the header X-Request-Id comes before it
    user: str | None = None
    response_format: ResponseFormat | None = None  # text
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    asked_in_vain: SkipJsonSchema[dict[str, str]] = Field(default_factory=dict, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _note_what_is_not_done(cls, data: Any) -> Any:
        """Known fields that ask for what this server does not do; they have no other place in the model."""
        if not isinstance(data, dict):
            return data
        return {**data, "asked_in_vain": refused(data, cls.not_done)}

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "it needs 'stream' to be true")
        if self.prompt_logprobs is not None and self.stream:
            raise wrong("prompt_logprobs", "it is not available with 'stream'")
        return self

    def unsupported_fields(self) -> dict[str, str]:
        """Fields whose value asks for what this server does not do, with the reason."""
        return dict(self.asked_in_vain)

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

    prompt: Prompts
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
    tool_calls: Annotated[list[dict[str, Any]] | None, BeforeValidator(_calls)] = None  # arguments as objects

    @model_validator(mode="after")
    def _only_an_assistant_may_be_silent(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise wrong("content", "a message needs it unless its role is 'assistant'")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: a silent assistant says the empty string."""
        fields = self.model_dump(exclude=None if self.tool_calls else {"tool_calls"})
        return {**fields, "content": self.content or ""}


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    not_done = {**REFUSED_EVERYWHERE, **REFUSED_IN_CHAT}

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None  # true, unless the final message is to be continued
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice = None  # auto where there are tools
    parallel_tool_calls: bool | None = None  # true
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[Any] | None = None

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "it needs 'logprobs' to be true")
        return self

    @model_validator(mode="after")
    def _one_way_to_go_on(self) -> "ChatCompletionRequest":
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise wrong("continue_final_message", "it cannot be used with 'add_generation_prompt'")
            if not self.messages[-1].content:
                raise wrong("continue_final_message", "the last message must have text")
        return self

    def unsupported_fields(self) -> dict[str, str]:
        """As in the base, and what came before tools, and modalities other than text."""
        refused = super().unsupported_fields()
        if self.modalities and self.modalities != ["text"]:
            refused["modalities"] = "is supported only as ['text']."
        if self.functions:
            refused["functions"] = "is not supported by this server: say 'tools'."
        if self.function_call is not None:
            refused["function_call"] = "is not supported by this server: say 'tool_choice'."
        return refused
