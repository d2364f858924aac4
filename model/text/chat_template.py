"""From messages to a prompt, as the checkpoint wants it.

Finds the checkpoint's template (chat_template.jinja, additional_chat_templates/, tokenizer_config.json) or
falls back to Mixtral's `[INST]` format; running templates is `model.text.jinja_template`'s work. What users
write never becomes a control token: special strings in their texts are marked before rendering and encoded
as plain characters.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from model.text.chat_messages import ChatTemplateError, plain_messages, plain_value
from model.text.jinja_template import MAX_TEMPLATE_CHARS, JinjaTemplate
from model.text.mixtral_instruct import encode_mixtral, render_mixtral
from model.text.tokenizer import SentencePieceTokenizer, Tokenizer
from model.text.tokenizer_files import read_json_object

__all__ = ["ChatTemplate", "ChatTemplateError"]

MAX_RENDERED_CHARS = 8 * 2**20
_RESERVED = frozenset({"messages", "add_generation_prompt"})
_START, _END = "\ufdd0", "\ufdd1"  # noncharacters: no text carries them


class ChatTemplate:
    """The chat format of one checkpoint: a Jinja template, Mixtral's built-in format, or none at all."""

    def __init__(self, templates: Mapping[str, JinjaTemplate], tokenizer: Tokenizer) -> None:
        """`templates` by name ("default", "tool_use", ...); empty for the built-in format, if it fits."""
        self._templates = templates
        self._tokenizer = tokenizer
        has_instruct_tokens = "[INST]" in tokenizer.added_tokens  # a later format of Mistral's, unlike v1
        self._is_mixtral = isinstance(tokenizer, SentencePieceTokenizer) and not has_instruct_tokens

    @classmethod
    def load(
        cls,
        model_dir: Path | str,
        tokenizer: Tokenizer,
        *,
        now: Callable[[], datetime] = datetime.now,
        max_chars: int = MAX_RENDERED_CHARS,
    ) -> "ChatTemplate":
        """The format of the checkpoint in `model_dir`. Raises ChatTemplateError for a bad template.

        `now` is what templates see as today; `max_chars` bounds a rendered chat.
        """
        sources = _read_sources(Path(model_dir))
        return cls({name: JinjaTemplate(text, now, max_chars) for name, text in sources.items()}, tokenizer)

    @property
    def source(self) -> str | None:
        """The default template as it is written; None for the built-in format and where there is none."""
        return self._templates["default"].source if "default" in self._templates else None

    @property
    def available(self) -> bool:
        """False where the checkpoint has no chat format: then `render` and `encode` raise."""
        return bool(self._templates) or self._is_mixtral

    @property
    def tools_text(self) -> str | None:
        """What the template that is used with `tools` writes of its own; None where none knows of tools."""
        template = self._templates.get("tool_use") or self._templates.get("default")
        return template.literal_text if template is not None and "tools" in template.variables else None

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> str:
        """The prompt as text, special tokens written out. `variables` are the template's own, such as `tools`.

        Raises ChatTemplateError with the reason, in the template's words where it gives one.
        """
        if (template := self._choose(variables)) is None:
            return render_mixtral(messages, self._tokenizer)
        return template.render(self._inputs(template, messages, add_generation_prompt, variables))

    def encode(
        self,
        messages: Sequence[Mapping[str, object]],
        tokenizer: Tokenizer,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: object,
    ) -> list[int]:
        """The prompt as ids. Special strings of the template become special ids, those of users do not.

        With `continue_final_message` the prompt ends with the text of the last message, which is to be gone on with.
        """
        if (template := self._choose(variables)) is None:
            return encode_mixtral(_open_ended(messages) if continue_final_message else messages, tokenizer)
        control_re = _control_re(tokenizer, template)
        inputs = self._inputs(template, messages, add_generation_prompt, variables)
        users = {name: value for name, value in inputs.items() if name in variables or name == "messages"}
        is_marked = _mentions(users, control_re)
        if is_marked:
            inputs = inputs | {name: _mark(value, control_re) for name, value in users.items()}
        text = template.render(inputs)
        if continue_final_message:
            text = _cut_after_final_message(text, inputs["messages"])
        return tokenizer.encode_template(_segments(text, control_re) if is_marked else [(text, False)])

    def _choose(self, variables: Mapping[str, object]) -> JinjaTemplate | None:
        """The template to use; None for the built-in format."""
        if not self._templates and self._is_mixtral:
            return None
        if variables.get("tools") and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        if self._templates:
            raise ChatTemplateError(f"none of the chat templates {sorted(self._templates)} is named 'default'")
        raise ChatTemplateError("this checkpoint has no chat template; use plain completions")

    def _inputs(
        self,
        template: JinjaTemplate,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool,
        variables: Mapping[str, object],
    ) -> dict[str, object]:
        named = self._tokenizer.special_tokens_map
        for name in variables:
            if name in _RESERVED or name in template.reserved or name in named:
                raise ChatTemplateError(f"{name}: is not a variable that a request may set")
        return {
            "tools": None,
            "documents": None,
            **named,
            **{name: plain_value(value, name) for name, value in variables.items()},
            "messages": plain_messages(messages, "\n"),
            "add_generation_prompt": add_generation_prompt,
        }


def _open_ended(messages: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """The same, the last one marked as mistral-common marks a beginning that is to be gone on with."""
    return [*messages[:-1], {**messages[-1], "prefix": True}]


def _cut_after_final_message(text: str, messages: object) -> str:
    """The rendered chat up to the end of the last message's text, as transformers cuts it.

    Where the template trims that text, so does this.
    """
    assert isinstance(messages, list)
    content = str(messages[-1].get("content") or "")
    place = text.rfind(content.strip())
    if not content.strip() or place < 0:
        raise ChatTemplateError("continue_final_message: the chat template does not show the last message's text")
    whole = content.lstrip()
    return text[: place + len(whole if text.startswith(whole, place) else content.strip())]


def _read_sources(model_dir: Path) -> dict[str, str]:
    """Template texts by name. Files of their own count before tokenizer_config.json, as in transformers."""
    sources: dict[str, str] = {}
    if (path := model_dir / "chat_template.jinja").is_file():
        sources["default"] = _read_text(path)
    for path in sorted((model_dir / "additional_chat_templates").glob("*.jinja")):
        sources[path.stem] = _read_text(path)
    if sources:
        return sources
    entry = read_json_object(model_dir / "tokenizer_config.json").get("chat_template")
    if isinstance(entry, str):
        return {"default": entry}
    if isinstance(entry, list) and all(isinstance(item, dict) for item in entry):
        return {_string(item, "name"): _string(item, "template") for item in entry}
    if entry is not None:
        raise ChatTemplateError("tokenizer_config.json: chat_template must be a string or a list of templates")
    return {}


def _string(item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise ChatTemplateError(f"tokenizer_config.json: chat_template[].{key} must be a string")
    return value


def _read_text(path: Path) -> str:
    if path.stat().st_size > 4 * MAX_TEMPLATE_CHARS:
        raise ChatTemplateError(f"{path.name}: longer than {MAX_TEMPLATE_CHARS} characters")
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ChatTemplateError(f"{path.name}: not UTF-8: {error}") from error


def _control_re(tokenizer: Tokenizer, template: JinjaTemplate) -> re.Pattern[str]:
    """Strings that stay plain in users' texts: special tokens, and added ones that the template writes."""
    control = [
        text
        for text, is_special in tokenizer.added_tokens.items()
        if is_special or (text in template.literal_text and not text.isspace())
    ]
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")


def _mentions(value: object, control_re: re.Pattern[str]) -> bool:
    if isinstance(value, str):
        return control_re.search(value) is not None
    if isinstance(value, Mapping):
        return any(_mentions(item, control_re) for item in value.values())
    return isinstance(value, list) and any(_mentions(item, control_re) for item in value)


def _mark(value: object, control_re: re.Pattern[str]) -> object:
    """Put markers around control strings, through lists and the values of objects."""
    if isinstance(value, str):
        clean = value.replace(_START, "").replace(_END, "")
        return control_re.sub(rf"{_START}\g<0>{_END}", clean)
    if isinstance(value, Mapping):
        return {key: _mark(item, control_re) for key, item in value.items()}
    if isinstance(value, list):
        return [_mark(item, control_re) for item in value]
    return value


def _segments(text: str, control_re: re.Pattern[str]) -> list[tuple[str, bool]]:
    """Cut a chat at its markers into (text, is_plain); a marker that the template tore off only cuts."""
    marked_re = re.compile(f"{_START}({control_re.pattern}){_END}|[{_START}{_END}]")
    pieces = marked_re.split(text)
    return [(piece, index % 2 == 1) for index, piece in enumerate(pieces) if index == 0 or piece]
