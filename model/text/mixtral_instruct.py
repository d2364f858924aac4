"""Mixtral-Instruct's `[INST]` format, for sentencepiece checkpoints that bring no template of their own.

The reference is mistral-common's version 1: each message is encoded by itself, so nothing a user writes can
become a control token, and system prompts stand before the first user message.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby

from model.text.chat_messages import ChatTemplateError, plain_messages
from model.text.tokenizer import Tokenizer

_JOINER = "\n\n"


def render_mixtral(messages: Sequence[Mapping[str, object]], tokenizer: Tokenizer) -> str:
    """The conversation as text with `<s>` and `</s>` written out, for people to read."""
    named = tokenizer.special_tokens_map
    pieces = [text + named.get("eos_token", "") * ends for text, ends in _turns(messages)]
    return named.get("bos_token", "") + "".join(pieces)


def encode_mixtral(messages: Sequence[Mapping[str, object]], tokenizer: Tokenizer) -> list[int]:
    """Ids of the conversation, bos first, eos after each finished answer.

    Raises ChatTemplateError for a conversation that mistral-common would refuse.
    """
    bos_id, eos_id = tokenizer.bos_id, next(iter(tokenizer.eos_ids), None)
    if bos_id is None or eos_id is None:
        raise ChatTemplateError("the tokenizer has no bos or no eos token, which the [INST] format needs")
    ids = [bos_id]
    for text, ends in _turns(messages):
        ids += tokenizer.encode(text, add_bos=False)
        ids += [eos_id] * ends
    return ids


def _turns(messages: Sequence[Mapping[str, object]]) -> list[tuple[str, bool]]:
    """(text, whether eos follows) per turn; neighbours of one role are one turn, joined by a blank line."""
    plain = plain_messages(messages, _JOINER)
    _check(plain)
    system = _join([message for message in plain if message["role"] == "system"])
    groups = [(role, list(group)) for role, group in groupby(plain, key=lambda message: message["role"])]
    groups = [(role, group) for role, group in groups if role != "system"]
    if not groups or groups[0][0] != "user":
        groups.insert(0, ("user", []))
    turns: list[tuple[str, bool]] = []
    for role, group in groups:
        text = _join(group)
        if role == "assistant":
            turns.append((text, group[-1].get("prefix") is not True))
            continue
        text = f"{system}{_JOINER}{text}" if system and not turns else text
        turns.append((f"[INST] {text} [/INST]", False))
    return turns


def _join(messages: Sequence[Mapping[str, object]]) -> str:
    return _JOINER.join(str(message["content"]) for message in messages if message["content"])


def _check(messages: Sequence[Mapping[str, object]]) -> None:
    """Refuse what mistral-common's validator refuses."""
    for index, message in enumerate(messages):
        where, role, content = f"messages[{index}]", message["role"], message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ChatTemplateError(f"{where}.role: {role!r} is not one of system, user, assistant")
        if content is None:
            raise ChatTemplateError(f"{where}.content: is missing")
        if role == "assistant" and not content:
            raise ChatTemplateError(f"{where}.content: an assistant's message must not be empty")
        if role == "system" and index > 0 and messages[index - 1]["role"] == "assistant":
            raise ChatTemplateError(f"{where}.role: 'system' must not follow 'assistant'")
        if message.get("prefix") is True and (role != "assistant" or index != len(messages) - 1):
            raise ChatTemplateError(f"{where}.prefix: only the last assistant message may have it")
    last = messages[-1]
    if last["role"] == "assistant" and last.get("prefix") is not True:
        raise ChatTemplateError("messages: the last message must be the user's (or an assistant's with prefix true)")
    if len(messages) == 1 and last["role"] == "assistant":
        raise ChatTemplateError("messages: a conversation must not begin with an answer")
