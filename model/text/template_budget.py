"""What one rendering of a chat template may spend: steps, and characters that it makes.

A template is a program of a stranger's. Its loops, calls and filters cost steps; what it joins, repeats, pads, replaces
and puts out costs characters; what asks for more than is left is refused before it is made. The limits are far above
what conversations need. How a template is compiled so that it pays is `model.text.jinja_template`'s.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import SecurityError

MAX_STEPS = 1_000_000
MAX_INTEGER_BITS = 8192
MAX_FILTER_NUMBER = 100_000
MAX_INDENT = 64
_CHARS_PER_STEP = 64
_CALL_STEPS = 8  # a call takes some ten times as long as going round in a loop
_BIG_NUMBER = re.compile(r"\d{6}")
_OWN_WIDTH = re.compile(r"%[^a-zA-Z%]*\*|\{[^{}]*\{")  # a width that comes with the values
_PADDING = frozenset({"center", "ljust", "rjust", "zfill"})
_NUMBERS_ARE_VALUES = frozenset({"default", "d", "int", "float", "round", "abs", "string", "tojson", "sum"})

BUDGET: ContextVar["Budget"] = ContextVar("chat_template_budget")
"""Of the rendering that runs now."""


class Budget:
    """What is left. Raises SecurityError for what would cost more."""

    def __init__(self, max_chars: int, steps: int = MAX_STEPS) -> None:
        self.max_chars = max_chars
        self._chars = 8 * max_chars
        self._steps = steps

    def step(self, cost: int = 1) -> None:
        """Something is done once; or `cost` times."""
        self._steps -= cost
        if self._steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values of a loop, a step each."""
        for value in values:
            self.step()
            yield value

    def make(self, chars: int) -> None:
        """A string, or a list, of so many is about to be made."""
        self._chars -= chars
        if chars > self.max_chars or self._chars < 0:
            raise SecurityError(f"what it makes is longer than {self.max_chars}")

    def work_on(self, values: Iterable[Any]) -> None:
        """A call or filter goes through all of these once."""
        self.step(_CALL_STEPS + sum(map(_cost, values)))


def size(value: object) -> int:
    """Characters or items; 0 for what has none."""
    return len(value) if isinstance(value, Sized) else 0


def _cost(value: object) -> int:
    return len(value) // _CHARS_PER_STEP if isinstance(value, str | bytes) else size(value)


def check_binary(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """`left operator right` makes something no larger than is left."""
    if operator == "+":
        budget.make(size(left) + size(right))
    elif operator == "%" and isinstance(left, str):
        check_format(budget, left, (right,))
    elif operator == "*" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_INTEGER_BITS:
            raise SecurityError(f"a number has more than {MAX_INTEGER_BITS} bits")
    elif operator == "*":
        count, unit = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(count, int):
            budget.make(size(unit) * max(0, count))


def check_format(budget: Budget, form: str | bytes, values: Sequence[Any]) -> None:
    """A format with widths of its own is short, and none takes a width from its values."""
    text = form.decode("latin-1") if isinstance(form, bytes) else form
    if _OWN_WIDTH.search(text) or _BIG_NUMBER.search(text):
        raise SecurityError("a format names a width of more than five digits, or takes it from a value")
    fields = text.count("%") + text.count("{")
    budget.make(len(text) + 100_000 * fields if _padded(text) else len(text) + fields * _largest(values))


def _padded(text: str) -> bool:
    return re.search(r"\d{4}", text) is not None


def _largest(values: Sequence[Any]) -> int:
    inner = [one for value in values for one in (value if isinstance(value, list | tuple) else (value,))]
    return max((size(one) for one in inner if isinstance(one, str | bytes)), default=0)


def check_method(budget: Budget, method: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Sequence[Any]:
    """A method of a value of the interpreter's own may be called so; the arguments to call it with."""
    method = getattr(method, "__wrapped__", method)  # the sandbox puts its own around str.format
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(owner, str | bytes | int | float | list | tuple | dict):
        return args
    for value in (*args, *named.values()):
        if isinstance(value, int) and abs(value) > budget.max_chars:
            raise SecurityError(f"{name} is called with a number above {budget.max_chars}")
    if isinstance(owner, int | float):
        budget.make(max((value for value in args if isinstance(value, int)), default=0))
    if isinstance(owner, str | bytes):
        return _check_text_method(budget, owner, name, args, named)
    return args


def _check_text_method(
    budget: Budget, owner: str | bytes, name: str, args: Sequence[Any], named: Mapping[str, Any]
) -> Sequence[Any]:
    if name in _PADDING and args and isinstance(args[0], int):
        budget.make(max(len(owner), args[0]))
    elif name == "expandtabs":
        width = (*args, *named.values(), 8)[0]
        budget.make(len(owner) * max(1, width if isinstance(width, int) else 1))
    elif name == "replace" and len(args) >= 2:
        budget.make(_replaced(owner, args[0], args[1]))
    elif name == "join" and args:
        items = list(args[0])
        budget.make(sum(map(size, items)) + len(owner) * len(items))
        return (items, *args[1:])
    elif name == "translate":
        table = args[0] if args and isinstance(args[0], dict) else {}
        budget.make(len(owner) * max(1, _largest(list(table.values()))))
    elif name in ("format", "format_map"):
        values = [*args, *named.values()]
        check_format(budget, owner, [*values, *(one for v in values if isinstance(v, dict) for one in v.values())])
    return args


def _replaced(text: Any, old: Any, new: Any) -> int:
    count = len(text) + 1 if not size(old) else len(text) // size(old)
    return len(text) + count * max(0, size(new) - size(old))


def check_filter(budget: Budget, name: str, args: Sequence[Any], named: Mapping[str, Any]) -> Sequence[Any]:
    """Filter `name` may be applied to args[0]; the arguments to apply it with."""
    budget.work_on(args)
    value, rest = args[0], [*args[1:], *named.values()]
    for one in rest:
        if isinstance(one, int) and abs(one) > MAX_FILTER_NUMBER and name not in _NUMBERS_ARE_VALUES:
            raise SecurityError(f"the filter {name} is given a number above {MAX_FILTER_NUMBER}")
    numbers = [one for one in rest if isinstance(one, int)]
    words = [one for one in rest if isinstance(one, str)]
    if name == "replace" and len(words) >= 2:
        budget.make(_replaced(str(value), words[0], words[1]))
    elif name == "indent":
        step = max([4, *numbers, *map(len, words)])
        budget.make(size(value) + (str(value).count("\n") + 2) * step)
    elif name == "tojson" and any(number > MAX_INDENT for number in numbers):
        raise SecurityError(f"tojson indents by more than {MAX_INDENT}")
    elif name == "join":
        items = list(value)
        budget.make(sum(map(size, items)) + len(items) * max([0, *map(len, words)]))
        return (items, *args[1:])
    elif name == "format":
        check_format(budget, str(value), rest)
    elif name == "sum" and any(not isinstance(one, int | float) for one in rest if not isinstance(one, str)):
        raise SecurityError("the filter sum adds numbers")
    elif isinstance(value, str):
        budget.make(len(value) * (1 + max([0, *map(len, words)])) if words else len(value))
    return args
