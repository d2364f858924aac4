"""What one request asks of tools: what its model is told of them, how its answer is read, and what it is held to.

Forms of answers without tools are `actors.front.structured`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.front.event_ids import StreamKey, digest
from actors.front.front_door import FrontDoor
from actors.front.openai_errors import ApiError, invalid, unsupported
from actors.front.openai_schema import ChatCompletionRequest
from actors.front.structured import Form
from actors.front.tools.formats import Calls, ToolFormat, format_of
from actors.front.tools.parsers import CallParser
from actors.front.tools.schema import Function, NamedChoice, Tool
from model.grammar.spec import GrammarError, GrammarKind, GrammarSpec


@dataclass(frozen=True, slots=True)
class ToolUse:
    """`form` is that of the answer, where calls or their arguments are enforced; else what was asked without tools.

    `marked_by_special`: special tokens are part of the text that is read.
    """

    format: ToolFormat
    told: tuple[dict[str, Any], ...]
    form: Form | None
    marked_by_special: bool

    def parser(self) -> CallParser:
        """For one answer."""
        return self.format.parser()

    def call_id(self, key: StreamKey, choice: int, call: int) -> str:
        """The same wherever the answer goes on."""
        drawn = digest(key.name.encode(), f"{choice}.{call}".encode(), size=12)
        return drawn[: self.format.id_chars] if self.format.id_chars else f"call_{drawn}"


def wanted_tools(front: FrontDoor, request: ChatCompletionRequest, form: Form | None) -> ToolUse | None:
    """None where no tools may be called. Raises ApiError naming the field."""
    _check_choice(request)
    _check_conversation(front, request)
    if not request.tools or request.tool_choice == "none":
        return None
    text = front.chat_template.tools_text
    if text is None:
        raise unsupported("tools", "is not supported: this model's chat template has no tools.")
    written = format_of(text)
    if written is None:
        raise unsupported("tools", "is not supported: this model's chat template writes calls in an unknown way.")
    special = bool(front.tokenizer.added_tokens.get(written.opening))
    told = tuple(tool.for_template() for tool in request.tools)
    return ToolUse(written, told, _form(front, request, request.tools, written, form), special)


def _form(
    front: FrontDoor, request: ChatCompletionRequest, tools: Sequence[Tool], written: ToolFormat, form: Form | None
) -> Form | None:
    """The grammar that enforces what has to be enforced."""
    named = request.tool_choice if isinstance(request.tool_choice, NamedChoice) else None
    functions = [tool.function for tool in tools if named is None or tool.function.name == named.function.name]
    free = named is None and request.tool_choice != "required"
    if not free and form is not None:
        raise invalid(form.field, f"Invalid value for '{form.field}': only where 'tool_choice' is auto or none.")
    if free and form is None and not any(function.strict for function in functions):
        return None
    several = named is None and request.parallel_tool_calls is not False
    try:
        calls = Calls(_held(functions, free=free), several)
        answer = None if form is None else _answer(form)
        lark = written.grammar(calls, front.tokenizer, free=free, form=answer)
        return Form("tools", GrammarSpec(GrammarKind.LARK, lark))
    except GrammarError as error:
        raise invalid("tools", f"Invalid value for 'tools': as a grammar, {str(error).rstrip('.')}.") from None


def _held(functions: Sequence[Function], *, free: bool) -> list[Function]:
    """Where the model may call or not, only functions that say so are held to their schema."""
    if not free:
        return list(functions)
    return [one if one.strict else one.model_copy(update={"strict": False}) for one in functions]


def _answer(form: Form) -> str:
    """A form as the body of a rule."""
    if form.spec.kind is not GrammarKind.JSON_SCHEMA:
        raise invalid(form.field, f"Invalid value for '{form.field}': with 'tools' it must be a JSON schema.")
    return f"%json {form.spec.text}"


def _check_choice(request: ChatCompletionRequest) -> None:
    choice, names = request.tool_choice, {tool.function.name for tool in request.tools or ()}
    if len(names) < len(request.tools or ()):
        raise invalid("tools", "Invalid value for 'tools': two functions have the same name.")
    if choice in (None, "none"):
        return
    if not names:
        raise invalid("tool_choice", "Invalid value for 'tool_choice': it is only allowed with 'tools'.")
    if isinstance(choice, NamedChoice) and choice.function.name not in names:
        field = "tool_choice.function.name"
        raise invalid(field, f"Invalid value for '{field}': no function of 'tools' has this name.")


def _check_conversation(front: FrontDoor, request: ChatCompletionRequest) -> None:
    """A template without tools would pass over calls and their results in silence."""
    if front.chat_template.tools_text is not None:
        return
    for place, message in enumerate(request.messages):
        if message.tool_calls or message.role == "tool":
            field = f"messages[{place}].{'tool_calls' if message.tool_calls else 'role'}"
            raise _no_tools(field)


def _no_tools(field: str) -> ApiError:
    return unsupported(field, "is not supported: this model's chat template has no tools.")
