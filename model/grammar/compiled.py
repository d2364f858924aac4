"""A grammar compiled for a vocabulary, and a matcher that follows one text through it, token by token.

The work is llguidance's (Earley parser over lexemes that are derivatives of regular expressions); limits on it are set
here. Compiling may take long or need much memory for a hostile grammar within the limits of `model.grammar.spec`:
whoever must not be held up has it tried elsewhere first.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from model.grammar.spec import GrammarError, GrammarKind, GrammarSpec
from model.grammar.vocabulary import Vocabulary

STEP_LEXER_FUEL = 50_000
STEP_MAX_ITEMS = 25_000
MAX_LEXER_STATES = 20_000
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=STEP_LEXER_FUEL,
    step_max_items=STEP_MAX_ITEMS,
    max_lexer_states=MAX_LEXER_STATES,
    max_grammar_size=200_000,
    verbose_errors=False,
)
_PLACE = re.compile(r"at \d+\(\d+\): ")
_MAX_REASON_CHARS = 300
_COMPLETE = ("NoExtension", "EndOfSentence")
_STUCK = "NoExtensionBias"


class GrammarFailed(Exception):
    """A text cannot go on: its grammar is too complex at this place, or no token of the vocabulary fits."""


def library_text(spec: GrammarSpec) -> str:
    """The grammar as `Compiled` takes it. Raises GrammarError. Bounded by the text's size, but for GBNF."""
    text = spec.lark()
    if spec.kind is not GrammarKind.LARK or "::=" not in text:
        return text
    try:
        return spec.lark().replace(spec.text, any_to_lark(spec.text), 1)
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except Exception as error:  # noqa: BLE001 - the library's converter raises whatever it meets
        raise GrammarError(_reason(str(error))) from None


@dataclass(frozen=True, slots=True)
class Next:
    """What may follow a text: `ids` of tokens that go on with it, ascending, and whether it may end here."""

    ids: NDArray[np.int64]
    may_end: bool


class Compiled:
    """One grammar. Raises GrammarError for one that is wrong, that no text fits, or that is too complex.

    Matchers of one grammar share what they find out about it, and nothing else.
    """

    def __init__(self, vocabulary: Vocabulary, text: str) -> None:
        self._vocabulary = vocabulary
        self._first = LLMatcher(vocabulary.ll_tokenizer, text, log_level=0, limits=_LIMITS)
        if self._first.is_error():
            raise GrammarError(_reason(self._first.get_error()))
        try:
            start = self.matcher().next()
        except GrammarFailed as error:
            raise GrammarError(str(error)) from None
        if not start.ids.size and not start.may_end:
            raise GrammarError("no text of this model's tokens can fit it")

    def matcher(self) -> "Matcher":
        """One for a new text."""
        return Matcher(self._vocabulary, self._first.deep_copy())


class Matcher:
    """Where one text stands in its grammar. From one thread at a time."""

    def __init__(self, vocabulary: Vocabulary, library: LLMatcher) -> None:
        self.vocabulary = vocabulary
        self.num_tokens = 0
        self._library = library
        self._ended = False

    def copy(self) -> "Matcher":
        """One that stands here too and goes its own way."""
        copied = Matcher(self.vocabulary, self._library.deep_copy())
        copied.num_tokens, copied._ended = self.num_tokens, self._ended
        return copied

    def observe(self, token: int) -> None:
        """The text goes on with `token`, or ends with one of the vocabulary's ends. Raises GrammarFailed."""
        if self._ended:
            raise GrammarFailed("the text has ended")
        if token in self.vocabulary.eos_ids:
            if not self.next().may_end:
                raise GrammarFailed("the text must not end here")
            self._ended = True
        elif not self._library.consume_token(token):
            raise GrammarFailed(self._why(f"token {token} does not fit"))
        self.num_tokens += 1

    def rewind(self, num_tokens: int) -> None:
        """Back to where the text had that many tokens. Raises GrammarFailed where the grammar has failed."""
        assert num_tokens <= self.num_tokens, (num_tokens, self.num_tokens)
        back = self.num_tokens - num_tokens
        if back and self._ended:
            self._ended = False
            back -= 1
        if back and not self._library.rollback(back):
            raise GrammarFailed(self._why("the text cannot be taken back"))
        self.num_tokens = num_tokens

    def next(self, ahead: Sequence[int] = ()) -> Next:
        """What may follow the text and the tokens `ahead`, which fit; the text itself stays. Raises GrammarFailed."""
        before = self.num_tokens
        try:
            for token in ahead:
                self.observe(token)
            return Next(np.empty(0, np.int64), True) if self._ended else self._look()
        finally:
            if self.num_tokens > before:
                self.rewind(before)

    def _look(self) -> Next:
        library, size = self._library, self.vocabulary.size
        bits = np.frombuffer(library.compute_bitmask(), dtype=np.uint8)
        if library.is_error():
            raise GrammarFailed(self._why("the grammar failed"))
        if library.is_stopped():
            return Next(np.empty(0, np.int64), library.stop_reason() in _COMPLETE)
        allowed = np.unpackbits(bits, bitorder="little").view(np.bool_)[:size]
        allowed[list(self.vocabulary.eos_ids)] = False
        return Next(np.flatnonzero(allowed), library.is_accepting())

    def _why(self, what: str) -> str:
        error = self._library.get_error()
        if error.startswith(_STUCK):
            return "no text of this model's tokens can fit it"
        return f"{what}: {_reason(error)}" if error else what


def _reason(error: str) -> str:
    """The library's first line, and its verdict on a regular expression, without what it says of our own wrapping."""
    lines = error.strip().splitlines() or ["it cannot be compiled"]
    line = _PLACE.sub("", lines[0]).removeprefix("failed to compile JSON schema: ").removeprefix("lexer error: ")
    verdict = next((one for one in lines[1:] if one.startswith("error: ")), None)
    if verdict is not None:
        line = f"{line.split(' (in regex)')[0]}: {verdict.removeprefix('error: ')}"
    return line[:_MAX_REASON_CHARS].rstrip(".")
