"""Reads one call, `{"name": ..., "arguments": {...}}`, from text that arrives in pieces.

Arguments are passed on as the model writes them, character by character; the name as soon as it is whole. The result
does not depend on where the pieces were cut.
"""

import json
from dataclasses import dataclass, field
from enum import Enum

_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


class _Place(Enum):
    """Where in the object the next character stands."""

    BEFORE = 0
    KEY = 1
    COLON = 2
    VALUE = 3
    AFTER = 4
    DONE = 5
    BROKEN = 6


@dataclass(slots=True)
class CallScanner:
    """`name` once it is known; `raw` is what was read of the object before that."""

    name: str | None = None
    raw: list[str] = field(default_factory=list)
    _place: _Place = _Place.BEFORE
    _key: str = ""
    _value: list[str] = field(default_factory=list)
    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False
    _untold: list[str] = field(default_factory=list)
    _has_arguments: bool = False

    @property
    def done(self) -> bool:
        """The object has ended."""
        return self._place is _Place.DONE

    @property
    def broken(self) -> bool:
        """It is no call after all."""
        return self._place is _Place.BROKEN or (self.done and self.name is None)

    def push(self, text: str) -> str:
        """Reads on, up to the object's end; returns what of `text` is behind it."""
        for place, char in enumerate(text):
            if self._place in (_Place.DONE, _Place.BROKEN):
                return text[place:]
            if not self.raw and char in _SPACE:
                continue
            if self.name is None:
                self.raw.append(char)
            self._step(char)
        return ""

    def take_arguments(self) -> str:
        """The arguments' text that came since the last time, once the name is known. No arguments are `{}`."""
        if self.name is None:
            return ""
        if self.done and not self._has_arguments:
            self._has_arguments = True
            return "{}"
        told = "".join(self._untold)
        self._untold.clear()
        return told

    def _step(self, char: str) -> None:
        if self._place is _Place.VALUE:
            self._in_value(char)
        elif self._place is _Place.KEY:
            self._in_key(char)
        elif char not in _SPACE:
            self._between(char)

    def _between(self, char: str) -> None:
        match self._place, char:
            case (_Place.BEFORE, "{") | (_Place.AFTER, ","):
                self._place, self._key = _Place.KEY, ""
            case _Place.AFTER, "}":
                self._place = _Place.DONE
            case _Place.COLON, ":":
                self._place, self._value = _Place.VALUE, []
            case _:
                self._place = _Place.BROKEN

    def _in_key(self, char: str) -> None:
        if not self._key and char in _SPACE:
            return
        if not self._key and char == "}":
            self._place = _Place.DONE
        elif not self._key and char != '"':
            self._place = _Place.BROKEN
        else:
            self._key += char
            if self._string_ends(char):
                self._place, self._key = _Place.COLON, _text(self._key) or ""
                self._has_arguments = self._has_arguments or self._key in _ARGUMENTS

    def _in_value(self, char: str) -> None:
        if not self._value and char in _SPACE:
            return
        if self._value and not self._in_string and self._depth == 0 and (char in ",}" or char in _SPACE):
            self._end_value()
            self._step(char)
            return
        self._keep(char)
        if self._in_string or char == '"':
            self._string_ends(char)
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        if self._depth < 0:
            self._place = _Place.BROKEN
        elif char in '}]"' and self._depth == 0 and not self._in_string:
            self._end_value()

    def _keep(self, char: str) -> None:
        """Arguments that are an object go on at once; written as a string, they do when it has ended."""
        is_object = self._key in _ARGUMENTS and (self._value or [char])[0] == "{"
        if is_object:
            self._untold.append(char)
        if not is_object or not self._value:
            self._value.append(char)

    def _end_value(self) -> None:
        self._place = _Place.AFTER
        if self._key == "name":
            self.name = _text("".join(self._value))
            if self.name is None:
                self._place = _Place.BROKEN
        elif self._key in _ARGUMENTS and self._value[0] == '"':
            self._untold.append(_text("".join(self._value)) or "")

    def _string_ends(self, char: str) -> bool:
        """Follows a string; True at the quote that ends it."""
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = not self._in_string
            return not self._in_string
        return False


def _text(literal: str) -> str | None:
    """The string that a JSON literal is, if it is one."""
    try:
        value = json.loads(literal)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
