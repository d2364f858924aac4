"""How chat formats write tool calls: a small registry, chosen by what a checkpoint's template says.

A format gives a parser for what the model writes, and a grammar for what it must write where calls are enforced.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.front.tools.parsers import CallParser, MarkedCalls
from actors.front.tools.schema import Function
from model.grammar.spec import json_schema
from model.text.tokenizer import Tokenizer

_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_TEXT = r"TEXT: /(.|\n)*/"
Mark = Callable[[str], str]
"""A marker as it stands in a rule of Lark: quoted text, or the special token that it is."""


@dataclass(frozen=True, slots=True)
class Calls:
    """What may be called: `functions`, their arguments as described, and whether several at once."""

    functions: Sequence[Function]
    several: bool


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls. `sign` is a text that only templates of this format have; ids of calls have `id_chars`
    characters, 0 for any number.
    """

    name: str
    sign: str
    opening: str
    closing: str | None
    rules: Callable[[Calls], str]
    id_chars: int = 0

    def parser(self) -> CallParser:
        """For one answer."""
        return MarkedCalls(self.opening, self.closing)

    def grammar(self, calls: Calls, tokenizer: Tokenizer, *, free: bool, form: str | None = None) -> str:
        """Lark for an answer that calls; `free`: or says something, before, between or instead.

        With `form`, a rule's body, an answer that does not call has that form.
        """
        marker = _marker_of(tokenizer)
        rules = [self.rules(calls), f"opening: {marker(self.opening)}"]
        if self.closing is not None:
            rules.append(f"closing: {marker(self.closing)}")
        if form is not None:
            start = ["start: calls | answer", f"answer: {form}"]
        elif not free:
            start = ["start: calls"]
        elif marker(self.opening).startswith("<"):
            start = ["start: TEXT (opening rest TEXT)*", _TEXT]
        else:
            start = ["start: (head rest)* tail", f"head[lazy]: TEXT {marker(self.opening)}", "tail: TEXT", _TEXT]
        return "\n".join([*start, *rules])


def format_of(template_text: str) -> ToolFormat | None:
    """The format of a chat template with that literal text; None for one that is not known here."""
    return next((one for one in FORMATS if one.sign in template_text and _OTHER not in template_text), None)


def _marker_of(tokenizer: Tokenizer) -> Mark:
    def marker(text: str) -> str:
        if not tokenizer.added_tokens.get(text):
            return json.dumps(text)
        ids = tokenizer.encode_template([(text, False)])
        return f"<[{ids[-1]}]>"

    return marker


def _call_schema(function: Function) -> dict[str, Any]:
    """`"strict": false` leaves the arguments to the model; without a word they are held to the schema."""
    free = function.parameters is None or function.strict is False
    arguments = _ANY_OBJECT if free else _moved(function.parameters, "#/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """The schema as it is at `place` of another one: what it refers to in itself has moved along."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = place + target.removeprefix("#")
    return moved


def _any_call(calls: Calls) -> str:
    return " | ".join(f"%json {json_schema(_call_schema(function)).text}" for function in calls.functions)


def _hermes_rules(calls: Calls) -> str:
    more = r' ("\n"? opening rest)*' if calls.several else ""
    return "\n".join([f"calls: opening rest{more}", r'rest: "\n"? call "\n"? closing', f"call: {_any_call(calls)}"])


def _mistral_rules(calls: Calls) -> str:
    more = r' ("," " "? call)*' if calls.several else ""
    return "\n".join(["calls: opening rest", f'rest: " "? "[" call{more} "]"', f"call: {_any_call(calls)}"])


HERMES = ToolFormat("hermes", "<tool_call>", "<tool_call>", "</tool_call>", _hermes_rules)
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", None, _mistral_rules, id_chars=9)
FORMATS = (HERMES, MISTRAL)
_OTHER = "[ARGS]"
"""Mistral's later format, which is not known here."""
