"""POST /tokenize and /detokenize, GET /tokenizer_info: the tokenizer for clients that have none of their own."""

import functools
from typing import Any

from actors.front.front_door import FrontDoor
from actors.front.openai_errors import invalid, model_not_found
from actors.front.prompts import MAX_TOKENIZE_BYTES, PromptTokens, num_text_bytes, render_chat, text_prompt
from actors.front.tokenize_schema import DetokenizeRequest, TokenizeRequest

Json = dict[str, Any]


async def tokenize(front: FrontDoor, request: TokenizeRequest) -> Json:
    """The tokens as a generation with the same prompt or messages reads them. Raises ApiError.

    A prompt that is just a special token's text gives its id: that is how remote tokenizers ask for ids.
    """
    _check_model(front, request.model)
    prompt = await _prompt(front, request)
    strings = None
    if request.return_token_strs:
        strings = [front.tokenizer.vocabulary_entry(token) for token in prompt.token_ids]
    return {
        "count": len(prompt.token_ids),
        "max_model_len": front.max_model_len,
        "tokens": list(prompt.token_ids),
        "token_strs": strings,
    }


async def _prompt(front: FrontDoor, request: TokenizeRequest) -> PromptTokens:
    if request.messages is not None:
        _check_size("messages", num_text_bytes(request.messages))
        return await render_chat(
            front,
            request.messages,
            request.chat_template_kwargs or {},
            add_generation_prompt=request.add_generation_prompt is not False and not request.continue_final_message,
            continue_final_message=bool(request.continue_final_message),
            add_special=bool(request.add_special_tokens),
        )
    text = request.prompt or ""
    if request.add_special_tokens is False and text in front.tokenizer.added_tokens:
        return PromptTokens(tuple(front.tokenizer.encode_template([(text, False)])), text)
    _check_size("prompt", len(text.encode()))
    return await text_prompt(front, text, add_special=request.add_special_tokens is not False)


async def detokenize(front: FrontDoor, request: DetokenizeRequest) -> Json:
    """The tokens' text, special ones written out. Raises ApiError."""
    _check_model(front, request.model)
    for place, token in enumerate(request.tokens):
        if token >= front.vocab_size:
            param = f"tokens[{place}]"
            raise invalid(param, f"Invalid value for '{param}': token ids must be below {front.vocab_size}.")
    work = functools.partial(front.tokenizer.decode, request.tokens, skip_special=False)
    return {"prompt": await front.text_work(len(request.tokens), work)}


def _check_size(param: str, num_bytes: int) -> None:
    if num_bytes > MAX_TOKENIZE_BYTES:
        raise invalid(
            param, f"Invalid value for '{param}': it must have at most {MAX_TOKENIZE_BYTES} bytes, not {num_bytes}."
        )


def _check_model(front: FrontDoor, model: str | None) -> None:
    if model is not None and model != front.model_id:
        raise model_not_found(model)
