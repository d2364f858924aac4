"""A checkpoint's own chat template, run in a sandbox set up as in transformers.

A template is a program that came with the weights. It may compute with the values it is given and nothing
else: attributes that lead into the interpreter are refused, and it is bounded in steps and in what it makes
(`model.text.template_budget`). For that it is compiled a little differently: loops, joins and what is put out
inside of macros and blocks go through filters that pay.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, ClassVar

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.text.chat_messages import ChatTemplateError
from model.text.template_budget import BUDGET, Budget, check_binary, check_filter, check_method, size

MAX_TEMPLATE_CHARS = 256 * 1024
MAX_EXPONENT = 64
# Names that no template can write.
_EACH, _TELL, _JOIN = "each step", "tell", "join all"
_COLLECTING = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)
_FOLDED_CHARS = 1 << 16
_MAX_ERROR_CHARS = 500
# Jinja's own, and what Python says of the code that it makes: parentheses too deep, numbers too long.
_COMPILE_ERRORS = (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, ArithmeticError)
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
        self.source = source
        self._max_chars = max_chars
        environment = _environment(now, max_chars)
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except _COMPILE_ERRORS as error:
            raise ChatTemplateError(f"the chat template is not valid: {str(error)[:_MAX_ERROR_CHARS]}") from error
        self.reserved = frozenset(environment.globals)
        literals = [node.data for node in tree.find_all(nodes.TemplateData)]
        literals += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        self.literal_text = "\0".join(literals)
        self.variables = frozenset(meta.find_undeclared_variables(tree))

    def render(self, variables: Mapping[str, object]) -> str:
        """The text; ChatTemplateError with the template's own words when it calls raise_exception."""
        chunks: list[str] = []
        num_chars = 0
        spending = BUDGET.set(Budget(self._max_chars))
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
            raise ChatTemplateError(f"the chat template failed: {str(error)[:_MAX_ERROR_CHARS]}") from error
        finally:
            BUDGET.reset(spending)
        return "".join(chunks)


class _Refusal(jinja2.TemplateError):
    """What a template raises by raise_exception."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox in which operators, calls, loops and filters are paid for."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(right) > MAX_EXPONENT or abs(left) > 2**64):
            raise SecurityError(f"{left}**{right} is too large a power")
        check_binary(_budget(), operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as in the base
        budget = _budget()
        budget.work_on(args)
        args = tuple(check_method(budget, __obj, args, kwargs))
        return super().call(__context, __obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _make_pay(tree)
        return tree


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


def _budget() -> Budget:
    """Of the rendering that runs; constants are folded before there is one."""
    return BUDGET.get(None) or Budget(_FOLDED_CHARS)


def _make_pay(tree: nodes.Template) -> None:
    """Puts filters around what loops go through, what `~` joins, and what macros and blocks collect."""
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = nodes.Filter(loop.iter, _EACH, [], [], None, None, lineno=loop.lineno)
    for block in list(tree.find_all(_COLLECTING)):
        for output in list(block.find_all(nodes.Output)):
            output.nodes = [
                nodes.Filter(_as_expression(node), _TELL, [], [], None, None, lineno=output.lineno)
                if not (isinstance(node, nodes.Filter) and node.name == _TELL)
                else node
                for node in output.nodes
            ]
    _replace_joins(tree)


def _as_expression(node: nodes.Expr) -> nodes.Expr:
    return nodes.Const(node.data, lineno=node.lineno) if isinstance(node, nodes.TemplateData) else node


def _replace_joins(node: nodes.Node) -> None:
    for name, value in list(node.iter_fields()):
        if isinstance(value, list):
            setattr(node, name, [_without_join(item) for item in value])
        elif isinstance(value, nodes.Node):
            setattr(node, name, _without_join(value))


def _without_join(value: Any) -> Any:
    if not isinstance(value, nodes.Node):
        return value
    _replace_joins(value)
    if isinstance(value, nodes.Concat):
        pieces = nodes.List(value.nodes, lineno=value.lineno)
        return nodes.Filter(pieces, _JOIN, [], [], None, None, lineno=value.lineno)
    return value


def _each(values: Any) -> Iterator[Any]:
    return _budget().each(values)


@jinja2.pass_context  # what takes the context is not folded into a constant: the same text is paid for each time
def _tell(_context: Context, value: Any) -> str:
    text = str(value)
    _budget().make(len(text))
    return text


def _join(pieces: Iterable[Any]) -> str:
    texts = [str(piece) for piece in pieces]
    _budget().make(sum(map(len, texts)))
    return "".join(texts)


def _paid(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays; some are given the environment or the context first."""
    first = 1 if hasattr(work, "jinja_pass_arg") else 0

    @functools.wraps(work)
    def paid(*args: Any, **kwargs: Any) -> Any:
        budget = _budget()
        result = work(*args[:first], *check_filter(budget, name, args[first:], kwargs), **kwargs)
        if size(result) > budget.max_chars:
            budget.make(size(result))
        return result

    return paid


def _environment(now: Callable[[], datetime], max_chars: int) -> _Sandbox:
    # Jinja's optimizer takes time with the square of how deep expressions are, and works before anything is paid for.
    extensions = [_GenerationTag, loopcontrols]
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.filters = {name: _paid(name, work) for name, work in environment.filters.items()}
    environment.filters |= {_EACH: _each, _TELL: _tell, _JOIN: _join}
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
