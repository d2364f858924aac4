"""What a client may ask of the tokenizer: the request bodies of /tokenize and /detokenize, as vLLM has them."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from actors.front.openai_schema import MAX_MESSAGES, Body, ChatMessage
from actors.front.request_fields import TemplateKwargs, TokenId, refused, wrong

MAX_DETOKENIZE_TOKENS = 262_144
_NOT_DONE = {
    "chat_template": ((), "is not accepted from requests: the checkpoint's own is used."),
    "media_io_kwargs": ((), "is not supported: this model reads text only."),
    "mm_processor_kwargs": ((), "is not supported: this model reads text only."),
}


class TokenizeRequest(Body):
    """POST /tokenize: a `prompt`, or `messages` through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None  # for a prompt true, for messages false
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None  # true, unless the final message is to be continued
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_in_vain(cls, data: Any) -> Any:
        for param, reason in refused(data, _NOT_DONE).items() if isinstance(data, dict) else ():
            raise wrong(param, f"it {reason.rstrip('.')}")
        return data

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise wrong("prompt", "either it or 'messages' must be given, and not both")
        if self.continue_final_message and self.add_generation_prompt:
            raise wrong("continue_final_message", "it cannot be used with 'add_generation_prompt'")
        if self.continue_final_message and self.messages is not None and not self.messages[-1].content:
            raise wrong("continue_final_message", "the last message must have text")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_DETOKENIZE_TOKENS)]
