"""Tool calls in what models write: found whatever the pieces, told as soon as they are certain, content else."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.front.tools.formats import HERMES, MISTRAL, Calls, ToolFormat, format_of
from actors.front.tools.parsers import CallParser, Written
from actors.front.tools.schema import Function
from model.grammar.spec import GrammarKind, GrammarSpec
from tests.support.grammars import byte_tokenizer, compiled, ramble
from tests.support.tool_templates import HERMES as HERMES_TEMPLATE
from tests.support.tool_templates import MISTRAL as MISTRAL_TEMPLATE

Read = tuple[str, list[tuple[str, str]]]


def read(parser: CallParser, pieces: Sequence[str]) -> Read:
    content, calls = "", list[list[str]]()

    def take(written: Written) -> None:
        nonlocal content
        content += written.content
        for piece in written.calls:
            if piece.index == len(calls):
                assert piece.name is not None, "the name comes first"
                calls.append([piece.name, ""])
            else:
                assert piece.name is None, "the name comes once"
            calls[piece.index][1] += piece.arguments

    for piece in pieces:
        take(parser.push(piece))
    take(parser.finish())
    assert parser.num_calls == len(calls)
    return content, [(name, arguments) for name, arguments in calls]


HERMES_TEXTS: list[tuple[str, Read]] = [
    (
        'Hi. \n<tool_call>\n{"name": "f", "arguments": {"a": "}\\"{", "b": [1, {"c": 2}]}}\n</tool_call>\n'
        '<tool_call>{"arguments": {}, "name": "g"}</tool_call>\n',
        ("Hi.", [("f", '{"a": "}\\"{", "b": [1, {"c": 2}]}'), ("g", "{}")]),
    ),
    ('<tool_call>{"name":"f"}</tool_call> so', ("so", [("f", "{}")])),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [("f", '{"a": 1}')])),
    ('<tool_call>{"id": 7, "name": "f", "parameters": {"a": null}}</tool_call>', ("", [("f", '{"a": null}')])),
    ('say <tool_call>{"name": "f", "arguments": {"a": 1', ("say", [("f", '{"a": 1')])),
    ('say <tool_call>{"na', ('say <tool_call>{"na', [])),
    ("a <tool_call> b </tool_call> c", ("a <tool_call>b </tool_call> c", [])),
    ('<tool_call>{"name": 3}</tool_call>z', ('<tool_call>{"name": 3}</tool_call>z', [])),
    ("no call <tool", ("no call <tool", [])),
    (" plain\n ", (" plain\n ", [])),
]
MISTRAL_TEXTS: list[tuple[str, Read]] = [
    (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"x": [1]}, "id": "a"}, {"name": "g", "arguments": {}}]',
        ("", [("f", '{"x": [1]}'), ("g", "{}")]),
    ),
    ('One.[TOOL_CALLS][{"name": "f", "arguments": {}}] tail', ("One.tail", [("f", "{}")])),
    ("ok[TOOL_CALLS]nope", ("ok[TOOL_CALLS]nope", [])),
    ("[TOOL_CALLS][]", ("[TOOL_CALLS][]", [])),
]
ALL = [(HERMES, *one) for one in HERMES_TEXTS] + [(MISTRAL, *one) for one in MISTRAL_TEXTS]


@pytest.mark.parametrize(("form", "text", "expected"), ALL)
def test_calls_and_content_are_told_apart(form: ToolFormat, text: str, expected: Read) -> None:
    assert read(form.parser(), [text]) == expected
    assert read(form.parser(), list(text)) == expected


@given(st.sampled_from(ALL), st.data())
def test_where_the_pieces_were_cut_does_not_matter(one: tuple[ToolFormat, str, Read], data: st.DataObject) -> None:
    form, text, expected = one
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(form.parser(), pieces) == expected


@given(st.text(max_size=60), st.sampled_from([HERMES, MISTRAL]))
def test_text_without_calls_is_content_to_the_letter(text: str, form: ToolFormat) -> None:
    assert read(form.parser(), list(text)) == (text, [])


def test_a_call_is_told_while_it_is_written() -> None:
    parser = HERMES.parser()
    assert parser.push('<tool_call>{"name": "f"').calls[0].name == "f"
    assert parser.push(', "arguments": {"city": "Par').calls[0].arguments == '{"city": "Par'
    assert parser.push("is").calls[0].arguments == "is"


def test_a_format_is_known_by_its_template() -> None:
    assert format_of(HERMES_TEMPLATE) is HERMES
    assert format_of(MISTRAL_TEMPLATE) is MISTRAL
    assert format_of("<|python_tag|>") is None
    assert format_of("[TOOL_CALLS]name[ARGS]{}") is None, "Mistral's later format"


# --- what is enforced is what is read ---

PLACE = {"$defs": {"where": {"enum": ["Paris", "Ulm"]}}, "type": "object", "additionalProperties": False}
PLACE |= {"properties": {"city": {"$ref": "#/$defs/where"}}, "required": ["city"]}
FUNCTIONS = [
    Function(name="weather", parameters=PLACE),
    Function(name="now", parameters={"type": "object", "additionalProperties": False}),
]


def grammar(form: ToolFormat, *, free: bool = False, several: bool = True, answer: str | None = None) -> Any:
    text = form.grammar(Calls(FUNCTIONS, several), byte_tokenizer(), free=free, form=answer)
    return compiled(GrammarSpec(GrammarKind.LARK, text))


def spoken(tokens: list[int]) -> str:
    return b"".join(map(byte_tokenizer().token_bytes, tokens)).decode(errors="replace")


@pytest.mark.parametrize("form", [HERMES, MISTRAL], ids=lambda form: form.name)
@pytest.mark.parametrize("several", [False, True])
def test_enforced_calls_are_read_as_calls_of_these_functions(form: ToolFormat, several: bool) -> None:
    counts = set()
    for seed in range(12):
        tokens, ended = ramble(grammar(form, several=several), seed, most=5000)
        content, calls = read(form.parser(), [spoken(tokens)])
        assert (ended, content) == (True, "")
        counts.add(len(calls))
        for name, arguments in calls:
            values = json.loads(arguments)
            assert values == {} if name == "now" else values["city"] in ("Paris", "Ulm")
    assert (max(counts) > 1) is several
    assert min(counts) == 1


@pytest.mark.parametrize("form", [HERMES, MISTRAL], ids=lambda form: form.name)
def test_free_text_is_held_to_the_form_of_a_call_from_its_opening_on(form: ToolFormat) -> None:
    matcher = grammar(form, free=True).matcher()

    def say(text: str) -> None:
        for byte in text.encode():
            matcher.observe(5 + byte)

    say("Well, ")
    assert matcher.next().may_end
    assert matcher.next().ids.size > 200
    say(form.opening)
    assert not matcher.next().may_end
    assert {byte_tokenizer().token_bytes(int(token)) for token in matcher.next().ids} <= {
        b"\n",
        b"{",
        b" ",
        b"[",
        b" [",
    }


def test_an_answer_may_have_a_form_or_be_a_call() -> None:
    said = {spoken(ramble(grammar(HERMES, free=True, answer='%json {"const": 5}'), seed)[0]) for seed in range(30)}
    assert "5" in said
    assert any(text.startswith("<tool_call>") for text in said)
    assert all(text == "5" or text.startswith("<tool_call>") for text in said)


def test_a_marker_that_is_a_special_token_is_that_token() -> None:
    form = ToolFormat("special", "x", "<|im_start|>", "<|im_end|>", HERMES.rules)
    matcher = grammar(form).matcher()
    assert matcher.next().ids.tolist() == [3]
    free = grammar(form, free=True).matcher()
    assert 3 in free.next().ids
    free.observe(3)
    assert not free.next().may_end


@pytest.mark.parametrize("make", [HERMES.parser, MISTRAL.parser])
def test_long_arguments_cost_in_proportion(make: Callable[[], CallParser]) -> None:
    text = json.dumps({"name": "f", "arguments": {"a": "x" * 200_000}})
    whole = f"<tool_call>{text}</tool_call>[TOOL_CALLS][{text}]"
    pieces = [whole[place : place + 7] for place in range(0, len(whole), 7)]
    assert len(read(make(), pieces)[1][0][1]) > 200_000
