"""Messages of a conversation as a chat format may see them: plain JSON values, content as one string.

Whoever sent them is not trusted: every complaint names the message and field, and no object with methods of
its own reaches a template.
"""

from collections.abc import Mapping, Sequence

MAX_DEPTH = 32


class ChatTemplateError(ValueError):
    """A conversation that a checkpoint's chat format cannot say, or a chat format that cannot be used."""


def plain_messages(messages: Sequence[Mapping[str, object]], joiner: str) -> list[dict[str, object]]:
    """Checked copies: a string `role`, no keys with None, text parts of `content` joined by `joiner`."""
    if not messages:
        raise ChatTemplateError("messages: must hold at least one message")
    return [_plain_message(message, f"messages[{index}]", joiner) for index, message in enumerate(messages)]


def plain_value(value: object, where: str, depth: int = 0) -> object:
    """A copy of `value` made of exactly the types of JSON; anything else is refused by its place."""
    if depth > MAX_DEPTH:
        raise ChatTemplateError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_value(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise ChatTemplateError(f"{where}: must be a JSON value, got {type(value).__name__}")


def _plain_message(message: Mapping[str, object], where: str, joiner: str) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"{where}: must be an object, got {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        raise ChatTemplateError(f"{where}.role: must be a string")
    plain = {str(key): plain_value(value, f"{where}.{key}") for key, value in message.items() if value is not None}
    if "content" in plain:
        plain["content"] = _text(plain["content"], f"{where}.content", joiner)
    return plain


def _text(content: object, where: str, joiner: str) -> str:
    """Content is a string or a list of parts like {"type": "text", "text": "..."}; empty ones are dropped."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ChatTemplateError(f"{where}: must be a string or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind != "text":
            raise ChatTemplateError(f"{where}[{index}].type: only 'text' is supported, got {kind!r}")
        if not isinstance(part.get("text"), str):
            raise ChatTemplateError(f"{where}[{index}].text: must be a string")
        texts.append(part["text"])
    return joiner.join(text for text in texts if text)
