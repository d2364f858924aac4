"""One JSON object of a model configuration, read field by field with errors that name the file and the field.

Which fields there are, and what they mean, is `model.storage.config_reader`'s and `model.storage.rope_reader`'s work.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from model.config import ModelConfigError
from model.storage.strict_json import JSONError, read_object

MAX_CONFIG_BYTES = 16 << 20
_MAX_INTEGER = 2**53  # what every JSON reader carries exactly


class FieldError(ModelConfigError):
    """A ModelConfigError that already names the file and the field."""


class Fields:
    """A JSON object of a configuration file; remembers which fields were asked for (`refuse_unread`)."""

    def __init__(self, path: Path, values: Mapping[str, object], prefix: str = "") -> None:
        self._path = path
        self._values = values
        self._prefix = prefix
        self._read: set[str] = set()

    @classmethod
    def load(cls, path: Path) -> "Fields":
        """Raises ModelConfigError where the file cannot be read as one JSON object of at most 16 MiB."""
        try:
            values, _ = read_object(path, MAX_CONFIG_BYTES)
        except (JSONError, OSError) as error:
            raise FieldError(f"{path}: {error}") from None
        return cls(path, values)

    def problem(self, name: str, what: str) -> "FieldError":
        """The error to raise about a field."""
        return FieldError(f"{self._path}: field '{self._prefix}{name}' {what}")

    def has(self, name: str) -> bool:
        """True where the field is written, null included."""
        return name in self._values

    def states(self, name: str) -> bool:
        """True where the field is written and not null."""
        self._read.add(name)
        return self._values.get(name) is not None

    def value(self, name: str) -> object:
        """The field as it stands. Raises where it is not written."""
        self._read.add(name)
        if name not in self._values:
            raise self.problem(name, "is missing")
        return self._values[name]

    def integer(self, name: str) -> int:
        """A whole number up to 2^53 in size."""
        value = self.value(name)
        if type(value) is not int or abs(value) > _MAX_INTEGER:
            raise self.problem(name, f"must be an integer, got {_shown(value)}")
        return value

    def optional_integer(self, name: str) -> int | None:
        """As `integer`, or None where the field is absent or null."""
        return self.integer(name) if self.states(name) else None

    def positive(self, name: str) -> float:
        """A finite number above zero."""
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.problem(name, f"must be a number, got {_shown(value)}")
        if not 0 < value <= _MAX_INTEGER or not math.isfinite(value):
            raise self.problem(name, f"must be above 0 and at most 2^53, got {_shown(value)}")
        return float(value)

    def optional_positive(self, name: str) -> float | None:
        """As `positive`, or None where the field is absent or null."""
        return self.positive(name) if self.states(name) else None

    def boolean(self, name: str, *, absent: bool) -> bool:
        """True or false; `absent` where the field is absent or null."""
        if not self.states(name):
            return absent
        value = self.value(name)
        if not isinstance(value, bool):
            raise self.problem(name, f"must be true or false, got {_shown(value)}")
        return value

    def object(self, name: str) -> "Fields":
        """A nested object, whose errors name the path to the field."""
        value = self.value(name)
        if not isinstance(value, dict):
            raise self.problem(name, f"must be an object, got {_shown(value)}")
        return Fields(self._path, value, f"{self._prefix}{name}.")

    def require(self, name: str, allowed: Collection[str]) -> None:
        """Refuse any value but these; absent or null is accepted."""
        if self.states(name) and self._values[name] not in allowed:
            raise self.problem(name, f"is {_shown(self._values[name])}; supported: {', '.join(allowed)}")

    def refuse_unread(self, ignored: Collection[str] = ()) -> None:
        """Refuse every field nobody asked for, but ignored names and empty values (null, false, 0)."""
        for name, value in self._values.items():
            if value and name not in self._read and name not in ignored:
                raise self.problem(name, f"is not known here (value {_shown(value)})")


def _shown(value: object) -> str:
    """A value as an error message can carry it."""
    text = repr(value) if not isinstance(value, int) or abs(value) <= _MAX_INTEGER else "a huge integer"
    return text if len(text) <= 80 else f"{text[:77]}..."
