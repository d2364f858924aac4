"""What form of answer a request asks for, as the grammar that its coordinator enforces, and whose fault a bad one is.

Forms are checked here for what is plain to see; whether a grammar can be used at all is found out where it is compiled,
by `actors.coordinator.grammars`, before anything is generated.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actors.front.openai_errors import ApiError, invalid, unsupported
from actors.front.openai_schema import GenerationRequest
from actors.front.structured_schema import ResponseFormat, StructuredOutputs
from model.grammar.spec import GrammarError, GrammarKind, GrammarSpec, choice, json_schema
from protos.coordinator_pb2 import (
    GRAMMAR_KIND_CHOICE,
    GRAMMAR_KIND_JSON_SCHEMA,
    GRAMMAR_KIND_LARK,
    GRAMMAR_KIND_REGEX,
    Grammar,
)

ANY_OBJECT: dict[str, Any] = {"type": "object"}
_COORDINATORS_WORD = "grammar: "
_KINDS = {
    GrammarKind.JSON_SCHEMA: GRAMMAR_KIND_JSON_SCHEMA,
    GrammarKind.REGEX: GRAMMAR_KIND_REGEX,
    GrammarKind.CHOICE: GRAMMAR_KIND_CHOICE,
    GrammarKind.LARK: GRAMMAR_KIND_LARK,
}


@dataclass(frozen=True, slots=True)
class Form:
    """The form of an answer: the field that asked for it, and its grammar."""

    field: str
    spec: GrammarSpec

    def wire(self) -> Grammar:
        """As a Submit carries it."""
        return Grammar(kind=_KINDS[self.spec.kind], text=self.spec.text)

    def blamed(self, error: str) -> ApiError | None:
        """The client's fault in what a coordinator said of the grammar; None where it is about something else."""
        if not error.startswith(_COORDINATORS_WORD):
            return None
        return _wrong(self.field, error.removeprefix(_COORDINATORS_WORD))


def wanted_form(request: GenerationRequest) -> Form | None:
    """The form that is asked for; None for free text. Raises ApiError naming the field."""
    asked = [*_response_format(request), *_structured_outputs(request), *_older(request)]
    if len(asked) > 1:
        fields = " and ".join(f"'{field}'" for field, _ in asked[:2])
        raise invalid(asked[1][0], f"Invalid value for '{asked[1][0]}': only one of {fields} may be set.")
    for field, make in asked:
        try:
            return Form(field, make())
        except GrammarError as error:
            raise _wrong(field, str(error)) from None
    return None


Asked = list[tuple[str, Callable[[], GrammarSpec]]]


def _response_format(request: GenerationRequest) -> Asked:
    wanted: ResponseFormat | None = request.response_format
    if wanted is None or wanted.type == "text":
        return []
    if wanted.type == "json_object":
        return [("response_format", lambda: json_schema(ANY_OBJECT))]
    if wanted.type != "json_schema":
        raise invalid(
            "response_format.type",
            "Invalid value for 'response_format.type': must be one of text, json_object, json_schema.",
        )
    named = wanted.json_schema
    if named is None:
        field = "response_format.json_schema"
        raise invalid(field, f"Missing required parameter: '{field}'.", "missing_required_parameter")
    schema = ANY_OBJECT if named.json_schema is None else named.json_schema
    return [("response_format.json_schema.schema", lambda: json_schema(schema))]


def _structured_outputs(request: GenerationRequest) -> Asked:
    wanted: StructuredOutputs | None = request.structured_outputs
    if wanted is None:
        return []
    _refuse_unknown(wanted)
    whitespace = "" if wanted.disable_any_whitespace else wanted.whitespace_pattern
    asked = _forms("structured_outputs.", wanted.json_schema, wanted.regex, wanted.choice, wanted.grammar, whitespace)
    if wanted.json_object:
        asked.append(("structured_outputs.json_object", lambda: json_schema(ANY_OBJECT, whitespace=whitespace)))
    if len(asked) != 1:
        raise invalid(
            "structured_outputs",
            "Invalid value for 'structured_outputs': it must have exactly one of json, regex, choice, grammar and "
            "json_object.",
        )
    return asked


def _refuse_unknown(wanted: StructuredOutputs) -> None:
    if wanted.structural_tag is not None:
        raise unsupported("structured_outputs.structural_tag", "is not supported by this server.")
    if wanted.disable_additional_properties:
        raise unsupported(
            "structured_outputs.disable_additional_properties",
            "is not supported: say 'additionalProperties': false in the schema.",
        )


def _older(request: GenerationRequest) -> Asked:
    """vLLM's names before `structured_outputs`."""
    return _forms(
        "guided_",
        request.guided_json,
        request.guided_regex,
        request.guided_choice,
        request.guided_grammar,
        request.guided_whitespace_pattern,
    )


def _forms(
    prefix: str,
    schema: dict[str, Any] | str | None,
    regex: str | None,
    choices: list[str] | None,
    grammar: str | None,
    whitespace: str | None,
) -> Asked:
    asked: Asked = []
    if schema is not None:
        asked.append((f"{prefix}json", lambda: json_schema(_object(schema), whitespace=whitespace)))
    if regex is not None:
        asked.append((f"{prefix}regex", lambda: GrammarSpec(GrammarKind.REGEX, regex)))
    if choices is not None:
        asked.append((f"{prefix}choice", lambda: choice(choices)))
    if grammar is not None:
        asked.append((f"{prefix}grammar", lambda: GrammarSpec(GrammarKind.LARK, grammar)))
    return asked


def _object(schema: dict[str, Any] | str) -> dict[str, Any]:
    """A schema, which vLLM takes as JSON text, too."""
    if not isinstance(schema, str):
        return schema
    GrammarSpec(GrammarKind.JSON_SCHEMA, schema)
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise GrammarError("it must be an object")
    return value


def _wrong(field: str, reason: str) -> ApiError:
    return invalid(field, f"Invalid value for '{field}': {reason.rstrip('.')}.")
