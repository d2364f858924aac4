"""A checkpoint's own chat template, run in a sandbox set up as in transformers.

A template is a program that came with the weights. It may compute with the values it is given and nothing
else: attributes that lead into the interpreter are refused, and so are outputs, repetitions and powers of
absurd size. It is not bounded in time, nor in every intermediate string: serving a checkpoint means
trusting it that far.
"""

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.text.chat_messages import ChatTemplateError

MAX_TEMPLATE_CHARS = 256 * 1024
MAX_EXPONENT = 64
# Everything that a template's own arithmetic and calls on plain values can raise.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)


class JinjaTemplate:
    """A compiled template. Raises ChatTemplateError when it is too long or not valid Jinja."""

    def __init__(self, source: str, now: Callable[[], datetime], max_chars: int) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ChatTemplateError(f"the chat template has {len(source)} characters, more than {MAX_TEMPLATE_CHARS}")
        self._max_chars = max_chars
        environment = _environment(now, max_chars)
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ChatTemplateError(f"the chat template is not valid: {error}") from error
        self.reserved = frozenset(environment.globals)
        literals = [node.data for node in tree.find_all(nodes.TemplateData)]
        literals += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        self.literal_text = "\0".join(literals)

    def render(self, variables: Mapping[str, object]) -> str:
        """The text; ChatTemplateError with the template's own words when it calls raise_exception."""
        chunks: list[str] = []
        num_chars = 0
        try:
            for chunk in self._template.generate(variables):
                num_chars += len(chunk)
                if num_chars > self._max_chars:
                    raise ChatTemplateError(f"the rendered chat has more than {self._max_chars} characters")
                chunks.append(chunk)
        except _Refusal as error:
            raise ChatTemplateError(error.message or "the chat template refuses these messages") from error
        except ChatTemplateError:
            raise
        except _RENDER_ERRORS as error:
            raise ChatTemplateError(f"the chat template failed: {error}") from error
        return "".join(chunks)


class _Refusal(jinja2.TemplateError):
    """What a template raises by raise_exception."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox with a limit on what one `*` or `**` can make."""

    intercepted_binops = frozenset({"*", "**"})
    max_chars = 0

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(right) > MAX_EXPONENT or abs(left) > 2**64):
            raise SecurityError(f"{left}**{right} is too large a power")
        if operator == "*" and max(_length(left) * _size(right), _length(right) * _size(left)) > self.max_chars:
            raise SecurityError(f"a repetition is longer than {self.max_chars}")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks answers for training; here it is just its body."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())


class _Dict:
    """`dict` in a template: makes dicts, shows no class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in a template: stores no name that begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _environment(now: Callable[[], datetime], max_chars: int) -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.max_chars = max_chars
    environment.filters["tojson"] = _to_json
    del environment.globals["lipsum"]
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters, which a model must not see."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace in the chat template stores {name!r}")


def _length(value: object) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _size(value: object) -> int:
    return abs(value) if isinstance(value, int) else 0
