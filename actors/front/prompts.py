"""From what a client wrote to token ids, without holding up the event loop and without reading what cannot fit."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.coordinator.submit_check import check_tokens
from actors.front.front_door import FrontDoor
from actors.front.openai_errors import ApiError, context_length_exceeded, invalid
from actors.front.openai_schema import ChatCompletionRequest, ChatMessage, CompletionRequest, GenerationRequest
from actors.front.submit_findings import as_http
from model.text.chat_template import ChatTemplateError

MAX_TOKENIZE_BYTES = 1 << 20
"""Of text that is only to be tokenized: it may be longer than the model's context."""
# What `ChatTemplate.encode` is given beside the template's own variables.
_OURS = frozenset({"self", "messages", "tokenizer", "add_generation_prompt", "continue_final_message", "tools"})
_FIELD = re.compile(r"messages(\[\d+\][\w.\[\]]*)?|continue_final_message")


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt as the model reads it; `text` is what the client wrote, None when it sent token ids."""

    token_ids: tuple[int, ...]
    text: str | None = None


async def completion_prompts(front: FrontDoor, request: CompletionRequest) -> list[PromptTokens]:
    """The prompts in order, text with what the tokenizer puts in front unless that is not wanted. Raises ApiError."""
    add_special = request.add_special_tokens is not False
    prompts: list[PromptTokens] = []
    for one in request.prompt:
        if isinstance(one, str):
            _check_size(front, "prompt", len(one.encode()))
            prompt = await text_prompt(front, one, add_special=add_special)
        else:
            prompt = _of_ids(front, one)
        prompts.append(_not_empty("prompt", _truncated(front, request, prompt, request.max_tokens)))
    return prompts


async def chat_prompt(
    front: FrontDoor, request: ChatCompletionRequest, tools: Sequence[Mapping[str, object]] = ()
) -> PromptTokens:
    """The conversation, and what tools there are, through the checkpoint's chat template. Raises ApiError."""
    _check_size(front, "messages", num_text_bytes(request.messages))
    prompt = await render_chat(
        front,
        request.messages,
        request.chat_template_kwargs or {},
        add_generation_prompt=request.add_generation_prompt is not False and not request.continue_final_message,
        continue_final_message=bool(request.continue_final_message),
        add_special=bool(request.add_special_tokens),
        tools=tools,
    )
    newer = request.max_completion_tokens
    num_output = request.max_tokens if newer is None else newer
    return _not_empty("messages", _truncated(front, request, prompt, num_output))


async def render_chat(
    front: FrontDoor,
    messages: Sequence[ChatMessage],
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    add_special: bool,
    tools: Sequence[Mapping[str, object]] = (),
) -> PromptTokens:
    """The conversation as the checkpoint's chat template reads it, `variables` being the template's own.

    Raises ApiError.
    """
    for name in variables:
        if name in _OURS:
            raise _wrong_kwargs(f"{name}: is not a variable that a request may set")
    told = [message.for_template() for message in messages]
    calls = [message["tool_calls"] for message in told if message.get("tool_calls")]
    num_beside = len(json.dumps([list(tools), calls])) if tools or calls else 0
    of_tools = {"tools": list(tools)} if tools else {}
    work = functools.partial(
        front.chat_template.encode,
        told,
        front.tokenizer,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **of_tools,
        **variables,
    )
    try:
        token_ids = await front.text_work(num_text_bytes(messages) + num_beside, work)
    except ChatTemplateError as error:
        reason = str(error).rstrip(".")
        if re.split(r"[.:\[]", reason, maxsplit=1)[0] in variables:
            raise _wrong_kwargs(reason) from None
        param, reason = _blamed(reason)
        raise invalid(param, f"Invalid value for '{param}': {reason}.") from None
    special = front.tokenizer.encode("", add_bos=True) if add_special else []
    return PromptTokens((*special, *token_ids))


def num_text_bytes(messages: Sequence[ChatMessage]) -> int:
    """How much text a conversation has, in bytes of UTF-8."""
    return sum(len((message.content or "").encode()) for message in messages)


def _wrong_kwargs(reason: str) -> ApiError:
    param = "chat_template_kwargs"
    return invalid(param, f"Invalid value for '{param}': {reason}.")


def _blamed(reason: str) -> tuple[str, str]:
    """The field that a chat format complains of, `messages[1].role`, and the complaint without it."""
    field, _, complaint = reason.partition(": ")
    return (field, complaint) if _FIELD.fullmatch(field) else ("messages", reason)


async def text_prompt(front: FrontDoor, text: str, *, add_special: bool) -> PromptTokens:
    """The tokens of a text, maybe none."""
    work = functools.partial(front.tokenizer.encode, text, add_bos=add_special)
    return PromptTokens(tuple(await front.text_work(len(text), work)), text)


def _of_ids(front: FrontDoor, token_ids: Sequence[int]) -> PromptTokens:
    with as_http("prompt"):
        check_tokens("prompt_token_ids", token_ids, front.submit_limits)
    return PromptTokens(tuple(token_ids))


def _truncated(
    front: FrontDoor, request: GenerationRequest, prompt: PromptTokens, num_output: int | None
) -> PromptTokens:
    """The prompt without what `truncate_prompt_tokens` takes away; -1 keeps as much as fits before the output."""
    keep = request.truncate_prompt_tokens
    if keep is None:
        return prompt
    if keep == -1:
        keep = max(1, front.max_model_len - (1 if num_output is None else num_output))
    if len(prompt.token_ids) <= keep:
        return prompt
    if request.truncation_side == "right":
        return PromptTokens(prompt.token_ids[:keep])
    return PromptTokens(prompt.token_ids[len(prompt.token_ids) - keep :])


def _check_size(front: FrontDoor, param: str, num_bytes: int) -> None:
    """Refuses text that is too long whatever its tokens are, before any time is spent on it."""
    least = num_bytes // front.longest_token_bytes
    if least > front.max_model_len:
        raise context_length_exceeded(param, front.max_model_len, least, 0, exact=False)


def _not_empty(param: str, prompt: PromptTokens) -> PromptTokens:
    if not prompt.token_ids:
        raise invalid(param, f"Invalid value for '{param}': it has no tokens.")
    return prompt
