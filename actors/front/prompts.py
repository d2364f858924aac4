"""From what a client wrote to token ids, without holding up the event loop and without reading what cannot fit."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from actors.front.front_door import FrontDoor
from actors.front.openai_errors import context_length_exceeded, invalid
from actors.front.openai_schema import ChatCompletionRequest, Prompt
from model.text.chat_template import ChatTemplateError

_FIELD = re.compile(r"messages(\[\d+\][\w.\[\]]*)?")


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt as the model reads it; `text` is what the client wrote, None when it sent token ids."""

    token_ids: tuple[int, ...]
    text: str | None = None


async def completion_prompts(front: FrontDoor, prompts: Sequence[Prompt]) -> list[PromptTokens]:
    """The prompts in order, text with what the tokenizer puts in front. Raises ApiError."""
    return [await _of_text(front, prompt) if isinstance(prompt, str) else _of_ids(front, prompt) for prompt in prompts]


async def chat_prompt(front: FrontDoor, request: ChatCompletionRequest) -> PromptTokens:
    """The conversation through the checkpoint's chat template. Raises ApiError."""
    messages = [message.for_template() for message in request.messages]
    num_bytes = sum(len(message["content"].encode()) for message in messages)
    _check_size(front, "messages", num_bytes)
    work = functools.partial(
        front.chat_template.encode,
        messages,
        front.tokenizer,
        add_generation_prompt=request.add_generation_prompt is not False,
    )
    try:
        token_ids = await front.text_work(num_bytes, work)
    except ChatTemplateError as error:
        param, reason = _blamed(str(error).rstrip("."))
        raise invalid(param, f"Invalid value for '{param}': {reason}.") from None
    return _not_empty("messages", PromptTokens(tuple(token_ids)))


def _blamed(reason: str) -> tuple[str, str]:
    """The field that a chat format complains of, `messages[1].role`, and the complaint without it."""
    field, _, complaint = reason.partition(": ")
    return (field, complaint) if _FIELD.fullmatch(field) else ("messages", reason)


async def _of_text(front: FrontDoor, text: str) -> PromptTokens:
    _check_size(front, "prompt", len(text.encode()))
    token_ids = await front.text_work(len(text), functools.partial(front.tokenizer.encode, text, add_bos=True))
    return _not_empty("prompt", PromptTokens(tuple(token_ids), text))


def _of_ids(front: FrontDoor, token_ids: Sequence[int]) -> PromptTokens:
    if max(token_ids) >= front.vocab_size:
        raise invalid("prompt", f"Invalid value for 'prompt': token ids must be below {front.vocab_size}.")
    return PromptTokens(tuple(token_ids))


def _check_size(front: FrontDoor, param: str, num_bytes: int) -> None:
    """Refuses text that is too long whatever its tokens are, before any time is spent on it."""
    least = num_bytes // front.longest_token_bytes
    if least > front.max_model_len:
        raise context_length_exceeded(param, front.max_model_len, least, 0, exact=False)


def _not_empty(param: str, prompt: PromptTokens) -> PromptTokens:
    if not prompt.token_ids:
        raise invalid(param, f"Invalid value for '{param}': it has no tokens.")
    return prompt
