"""What a text must follow, as it was asked, and within which limits; and how the library llguidance is told so.

Nothing is compiled here: that is `model.grammar.compiled`'s work, and only where it may be killed is it done first.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np
from llguidance import regex_to_lark

MAX_TEXT_BYTES = 128 * 1024
MAX_REGEX_BYTES = 16 * 1024
MAX_DEPTH = 64
"""Of arrays and objects in a schema, and of brackets in a regular expression or a grammar."""
MAX_CHOICES = 4096
WHITESPACE = r"[ \t\r\n]{1,32}"
"""Between the tokens of JSON unless a schema says otherwise: enough to indent, not enough to never come to an end."""

# Without it the library lets only one way to cut a forced text into tokens pass; the model shall choose.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
_OPTIONS_KEY = "x-guidance"


class GrammarError(ValueError):
    """A grammar that cannot be used; the message says why, without the field's name."""


class GrammarKind(Enum):
    """What a grammar's text is."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    """Of Rust's `regex` crate, without look-around; the whole text must match."""
    CHOICE = "choice"
    """A JSON array of strings."""
    LARK = "lark"
    """llguidance's Lark, or GBNF as llama.cpp writes it."""


_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"?|[^][(){}"]+', re.DOTALL)
_ESCAPES = re.compile(r"\\.|[^][(){}\\]+", re.DOTALL)
_PLAIN = {  # what is no bracket, or one that opens nothing
    GrammarKind.JSON_SCHEMA: _STRINGS,
    GrammarKind.REGEX: _ESCAPES,
    GrammarKind.CHOICE: _STRINGS,
    GrammarKind.LARK: _STRINGS,
}
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"([{")] = 1
_STEPS[list(b")]}")] = -1


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """One grammar, within the limits of this file. Raises GrammarError naming the limit."""

    kind: GrammarKind
    text: str

    def __post_init__(self) -> None:
        most = MAX_REGEX_BYTES if self.kind is GrammarKind.REGEX else MAX_TEXT_BYTES
        size = len(self.text.encode(errors="surrogatepass"))
        if size > most:
            raise GrammarError(f"it has {size} bytes, but must have at most {most}")
        if not self.text:
            raise GrammarError("it is empty")
        deepest = _depth(_PLAIN[self.kind].sub("", self.text))
        if deepest > MAX_DEPTH:
            raise GrammarError(f"it is nested {deepest} levels deep, but at most {MAX_DEPTH} are allowed")

    def lark(self) -> str:
        """As llguidance's Lark; GBNF is left as it is. Raises GrammarError."""
        match self.kind:
            case GrammarKind.JSON_SCHEMA:
                return f"{_OPTIONS}start: %json {json.dumps(_schema(self.text))}"
            case GrammarKind.REGEX:
                return f"{_OPTIONS}start: /{regex_to_lark(self.text)}/"
            case GrammarKind.CHOICE:
                alternatives = " | ".join(_literal(choice) for choice in _choices(self.text))
                return f"{_OPTIONS}start: {alternatives}"
        return f"{self.text}\n{_OPTIONS}"


def json_schema(schema: Mapping[str, object], *, whitespace: str | None = None) -> GrammarSpec:
    """JSON that `schema` describes. `whitespace` is a regular expression for what may stand between its tokens;
    empty for nothing. Of several schemas in a `oneOf` at least one fits. Raises GrammarError.
    """
    options = schema.get(_OPTIONS_KEY, {})
    if not isinstance(options, Mapping):
        raise GrammarError(f"its '{_OPTIONS_KEY}' must be an object")
    asked: dict[str, object] = {"coerce_one_of": True, "whitespace_pattern": whitespace or WHITESPACE}
    if whitespace == "":
        asked = {"coerce_one_of": True, "whitespace_flexible": False}
    try:
        text = json.dumps({**schema, _OPTIONS_KEY: {**asked, **options}}, allow_nan=False, ensure_ascii=False)
    except RecursionError:
        raise GrammarError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    except (TypeError, ValueError) as error:
        raise GrammarError(f"it is not JSON: {error}") from None
    return GrammarSpec(GrammarKind.JSON_SCHEMA, text)


def choice(choices: Iterable[str]) -> GrammarSpec:
    """One of `choices`, exactly. Raises GrammarError."""
    spec = GrammarSpec(GrammarKind.CHOICE, json.dumps(list(choices), ensure_ascii=False))
    _choices(spec.text)
    return spec


def _schema(text: str) -> object:
    value = _parsed(text)
    if not isinstance(value, dict):
        raise GrammarError("a JSON schema must be an object")
    return value


def _choices(text: str) -> list[str]:
    value = _parsed(text)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise GrammarError("it must be a non-empty array of strings")
    if len(value) > MAX_CHOICES:
        raise GrammarError(f"it has {len(value)} choices, but must have at most {MAX_CHOICES}")
    if not all(value):
        raise GrammarError("a choice must not be the empty string")
    return list(dict.fromkeys(value))


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except RecursionError:
        raise GrammarError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise GrammarError(f"it is not JSON: {error}") from None


def _literal(text: str) -> str:
    """A string of Lark: JSON's escapes are understood there, the control character DEL is not."""
    return json.dumps(text).replace("\x7f", "\\u007f")


def _depth(brackets: str) -> int:
    """Levels that are open at once, at most."""
    steps = _STEPS[np.frombuffer(brackets.encode(errors="replace"), np.uint8)]
    return int(np.cumsum(steps, dtype=np.int64).max(initial=0))
