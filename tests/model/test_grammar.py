"""Grammars: what is let through fits them, what fits is let through, and bad ones are refused with the reason."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.grammar.compiled import Compiled, GrammarFailed, library_text
from model.grammar.spec import MAX_TEXT_BYTES, GrammarError, GrammarKind, GrammarSpec, choice, json_schema
from model.grammar.vocabulary import Vocabulary
from model.text.sentencepiece_tokenizer import SentencePieceTokenizer
from model.text.tokenizer_files import SpecialTokens
from tests.support.grammars import VOCAB, byte_tokenizer, byte_vocabulary, compiled, ramble, text_of
from tests.support.tokenizers import EOS_ID, mixtral_sentencepiece

A, B = (byte_tokenizer().encode(text, add_bos=False)[0] for text in "ab")


def regex(pattern: str) -> GrammarSpec:
    return GrammarSpec(GrammarKind.REGEX, pattern)


def lark(text: str) -> GrammarSpec:
    return GrammarSpec(GrammarKind.LARK, text)


# --- what is let through fits ---

names = st.sampled_from(["a", "b", "name", "x y", 'quo"te', "ü", "back\\slash"])
bounds = st.integers(-1000, 1000)


def _ranges(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    pair = st.tuples(bounds, st.integers(0, 500))
    return pair.map(lambda two: {"type": kind, "minimum": two[0], "maximum": two[0] + two[1]})


leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    _ranges("integer"),
    _ranges("number"),
    st.integers(0, 6).map(lambda size: {"type": "string", "maxLength": size}),
    st.integers(0, 4).map(lambda size: {"type": "string", "minLength": size, "maxLength": size + 3}),
    st.sampled_from(["^[a-c]{2,4}$", "^(x|yy)+z$", "^[0-9]{3}-[0-9]{2}$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(["date", "uuid", "ipv4", "time"]).map(lambda name: {"type": "string", "format": name}),
    st.lists(st.one_of(st.text(max_size=5), bounds, st.booleans(), st.none()), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    st.text(max_size=6).map(lambda value: {"const": value}),
)


def _objects(children: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], data: random.Random) -> dict[str, Any]:
        required = [name for name in properties if data.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(build, st.dictionaries(names, children, max_size=4), st.randoms(use_true_random=False))


def _arrays(children: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    sizes = st.tuples(st.integers(0, 2), st.integers(0, 2))
    return st.builds(
        lambda items, size: {"type": "array", "items": items, "minItems": size[0], "maxItems": sum(size)},
        children,
        sizes,
    )


schemas = st.recursive(
    leaves,
    lambda children: st.one_of(
        _objects(children), _arrays(children), st.lists(children, min_size=1, max_size=3).map(lambda of: {"anyOf": of})
    ),
    max_leaves=8,
)
patient = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@patient
@given(schemas, st.integers(0, 1000), st.sampled_from([None, "", " ?"]))
def test_what_a_schema_lets_through_is_json_that_validates(schema: Any, seed: int, whitespace: str | None) -> None:
    tokens, ended = ramble(compiled(json_schema(schema, whitespace=whitespace)), seed)
    assert ended, "these schemas and white space are bounded"
    checked = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker(["date", "uuid", "ipv4"]))
    checked.validate(json.loads(text_of(tokens)))


PATTERNS = [
    r"[a-c]+\d{2}", r"(foo|bar)?baz*", r"a/[bd]\\c", r'"[^"\n]{1,4}"', r"[é-ü]{2}\s?ß", r"(ab|a)(bc|c)?",
    r"[A-Z_]{1,3}@[a-z]{2}", r".{3}", r"x{2,4}(?:y|zz){0,2}", r"[\x00-\x1f]", r"(?i)Hello", r"😀|😁+",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_a_regular_expression_lets_through_matches_it_whole(pattern: str) -> None:
    grammar = compiled(regex(pattern))
    said = set()
    for seed in range(12):
        tokens, ended = ramble(grammar, seed)
        assert ended
        assert re.fullmatch(pattern, text_of(tokens)), (pattern, text_of(tokens))
        said.add(text_of(tokens))
    assert len(said) > 1, "more than one text fits each of these"


@patient
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6), st.integers(0, 1000))
def test_a_choice_is_one_of_its_strings_to_the_letter(choices: list[str], seed: int) -> None:
    tokens, ended = ramble(compiled(choice(choices)), seed)
    assert ended
    assert text_of(tokens) in choices


@patient
@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5), st.data())
def test_every_choice_is_let_through_however_it_is_cut_into_tokens(choices: list[str], data: st.DataObject) -> None:
    wanted = data.draw(st.sampled_from(choices))
    matcher = compiled(choice(choices)).matcher()
    by_tokenizer = byte_tokenizer().encode(wanted, add_bos=False)
    by_bytes = [5 + byte for byte in wanted.encode()]
    for token in data.draw(st.sampled_from([by_tokenizer, by_bytes])):
        assert token in matcher.next().ids
        matcher.observe(token)
    assert matcher.next().may_end


@pytest.mark.parametrize(
    "text", ['start: "<" word ("," word)* ">"\nword: /[a-c]{2}/', 'root ::= "<" w ("," w)* ">"\nw ::= [a-c] [a-c]\n']
)
def test_lark_and_gbnf(text: str) -> None:
    for seed in range(8):
        tokens, ended = ramble(compiled(lark(text)), seed)
        assert ended
        assert re.fullmatch(r"<[a-c]{2}(,[a-c]{2})*>", text_of(tokens))


def test_a_schema_may_refer_to_itself_and_be_a_string_in_lark() -> None:
    tree = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
    }
    tree["additionalProperties"] = False  # type: ignore[assignment]
    tokens, ended = ramble(compiled(json_schema(tree, whitespace="")), 1)
    assert ended
    jsonschema.validate(json.loads(text_of(tokens)), tree)


def test_of_one_of_several_schemas_at_least_one_fits() -> None:
    schema = {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "string", "pattern": "^a{1,3}$"}]}
    tokens, _ = ramble(compiled(json_schema(schema)), 3)
    assert isinstance(json.loads(text_of(tokens)), str)


# --- the matcher ---


def test_an_end_is_allowed_only_where_the_grammar_may_end_and_forced_where_it_must() -> None:
    matcher = compiled(regex("ab?")).matcher()
    assert (matcher.next().ids.tolist(), matcher.next().may_end) == ([A], False)
    matcher.observe(A)
    assert (matcher.next().ids.tolist(), matcher.next().may_end) == ([B], True)
    matcher.observe(B)
    assert (matcher.next().ids.size, matcher.next().may_end) == (0, True)
    matcher.observe(EOS_ID)
    with pytest.raises(GrammarFailed, match="ended"):
        matcher.observe(A)
    early = compiled(regex("ab?")).matcher()
    with pytest.raises(GrammarFailed, match="must not end"):
        early.observe(EOS_ID)


def test_no_special_token_is_ever_text() -> None:
    following = compiled(regex("(?s).*")).matcher().next()
    assert not set(following.ids) & byte_vocabulary().special_ids
    assert max(following.ids) < 300, "ids without bytes are nothing"


@patient
@given(schemas, st.integers(0, 1000), st.data())
def test_going_ahead_going_back_and_copies_leave_the_way_as_it_is(schema: Any, seed: int, data: st.DataObject) -> None:
    grammar = compiled(json_schema(schema))
    tokens, _ = ramble(grammar, seed, most=60)
    masks, straight = [], grammar.matcher()
    for token in tokens:
        masks.append(straight.next())
        straight.observe(token)
    masks.append(straight.next())
    winding = grammar.matcher()
    for _ in range(10):
        place = winding.num_tokens
        match data.draw(st.sampled_from(["on", "ahead", "back", "copy"])):
            case "on" if place < len(tokens):
                winding.observe(tokens[place])
            case "ahead":
                size = data.draw(st.integers(0, len(tokens) - place))
                assert winding.next(tokens[place : place + size]).ids.tolist() == masks[place + size].ids.tolist()
            case "back":
                winding.rewind(data.draw(st.integers(0, place)))
            case "copy":
                other = winding.copy()
                for token in tokens[place:]:
                    other.observe(token)
        here = winding.next()
        assert here.ids.tolist() == masks[winding.num_tokens].ids.tolist()
        assert here.may_end == masks[winding.num_tokens].may_end


def test_it_goes_back_over_its_end() -> None:
    matcher = compiled(choice(["ab"])).matcher()
    for token in (A, B, EOS_ID):
        matcher.observe(token)
    matcher.rewind(1)
    assert matcher.next().ids.tolist() == [B]


def test_neighbours_of_one_grammar_do_not_meet() -> None:
    grammar = compiled(regex("(a|b){9}"))
    one, other = grammar.matcher(), grammar.matcher()
    for _ in range(5):
        one.observe(A)
    with pytest.raises(GrammarFailed):
        one.observe(5 + ord("c"))
    with pytest.raises(GrammarFailed):
        one.next()
    assert other.num_tokens == 0
    assert {A, B} <= set(other.next().ids)


# --- what is refused ---


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: json_schema({"type": "strin"}), "strin"),
        (lambda: json_schema({"type": "integer", "minimum": 5, "maximum": 3}), r"minimum \(5\)"),
        (lambda: json_schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "Unsatisfiable"),
        (lambda: json_schema({"not": {"type": "string"}}), "not"),
        (lambda: json_schema({"$ref": "http://elsewhere/schema"}), "elsewhere"),
        (lambda: json_schema({"description": "x" * MAX_TEXT_BYTES}), str(MAX_TEXT_BYTES)),
        (lambda: json_schema({"a": float("nan")}), "not JSON"),
        (lambda: json_schema({"x-guidance": 3}), "x-guidance"),
        (lambda: GrammarSpec(GrammarKind.JSON_SCHEMA, "[]"), "object"),
        (lambda: GrammarSpec(GrammarKind.JSON_SCHEMA, '{"a":' * 70 + "1" + "}" * 70), "70 levels"),
        (lambda: regex("(a"), "unclosed"),
        (lambda: regex("(?=a)b"), "look-around"),
        (lambda: regex(""), "empty"),
        (lambda: regex("(" * 100 + ")" * 100), "100 levels"),
        (lambda: regex("a" * 20000), "16384"),
        (lambda: choice([]), "non-empty"),
        (lambda: choice(["a", ""]), "empty string"),
        (lambda: choice([str(number) for number in range(5000)]), "4096"),
        (lambda: lark("start: nowhere"), "nowhere"),
        (lambda: lark("start: A\nA: /[a-z]+/ & /[0-9]+/"), "no text"),
        (lambda: lark("start: start"), "no text"),
        (lambda: lark('root ::= "a" [0-9'), "Unexpected end"),
        (lambda: lark(f"start: <[{EOS_ID}]>"), "no text"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_with_the_reason(make: Callable[[], GrammarSpec], reason: str) -> None:
    with pytest.raises(GrammarError, match=reason):
        compiled(make())


def test_brackets_in_strings_of_a_schema_or_grammar_do_not_nest() -> None:
    compiled(json_schema({"const": "[{(" * 40}))
    compiled(lark('start: "' + "(((" * 40 + '"'))
    compiled(regex(r"\(" * 200))


def test_a_model_without_an_end_has_no_grammars() -> None:
    with pytest.raises(GrammarError, match="end-of-sequence"):
        Vocabulary.of(4, lambda token: b"x", lambda token: False, [7])


def test_a_grammar_fails_alone_where_it_becomes_too_complex() -> None:
    matcher = compiled(regex("((a{1,1000}){1,1000}){1,1000}")).matcher()

    def go_on() -> None:
        for _ in range(3000):
            matcher.next()
            matcher.observe(A)

    with pytest.raises(GrammarFailed, match="too many"):
        go_on()
    with pytest.raises(GrammarFailed, match="too many"):
        matcher.next()


# --- the vocabulary ---


def test_the_vocabulary_travels_as_plain_parts() -> None:
    facts, blob = byte_vocabulary().parts()
    again = Vocabulary.from_parts(json.loads(json.dumps(facts)), blob)
    assert again == byte_vocabulary()
    assert again.size == VOCAB
    assert again.ll_tokenizer.vocab_size == VOCAB


TEXT = 'Grüße, Ivan!\n\tπ≈3.14 «ok» 😀 {"a": [1, 2]}  two  spaces'


@given(st.text(max_size=40))
def test_the_bytes_of_tokens_joined_are_the_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text, add_bos=False)
    assert b"".join(
        byte_vocabulary().tokens[token] for token in ids if token not in byte_vocabulary().special_ids
    ) == text.encode() or any(token in byte_vocabulary().special_ids for token in ids)


def test_sentencepiece_tokens_are_their_bytes_too(tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(mixtral_sentencepiece(), SpecialTokens())
    vocabulary = Vocabulary.of(tokenizer.vocab_size, tokenizer.token_bytes, tokenizer.is_special, tokenizer.eos_ids)
    ids = tokenizer.encode(TEXT, add_bos=False)
    assert b"".join(vocabulary.tokens[token] for token in ids).decode().removeprefix(" ") == TEXT
    assert tokenizer.decode(ids) == TEXT
    assert {0, 1, 2} & vocabulary.special_ids >= {1, 2}
    grammar = Compiled(vocabulary, library_text(choice([TEXT])))
    tokens, ended = ramble(grammar, 4)
    assert ended
    assert b"".join(vocabulary.tokens[token] for token in tokens).decode() == TEXT
