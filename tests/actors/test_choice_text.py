"""A choice's tokens as text: stop strings and tokens, min_tokens, and log-probabilities that keep step."""

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from actors.front.choice_text import Answer, ChoiceText, Delta, TextRules
from protos.coordinator_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    FinishReason,
    PositionLogprobs,
    SequenceOutput,
    TokenLogprob,
)

EOS = 0
STOP_TOKEN = ord("#")


class Letters:
    """Token n is the character n; token 0 has no text; 0xE9 needs two tokens, its bytes 0xC3 and 0xA9 plus 1000."""

    def __init__(self) -> None:
        self._half = b""

    def push(self, ids: Sequence[int]) -> str:
        text = ""
        for token in ids:
            if token >= 1000:
                self._half += bytes([token - 1000])
                if len(self._half) == 2:
                    text, self._half = text + self._half.decode(), b""
            elif token != EOS:
                text += chr(token)
        return text

    def flush(self) -> str:
        half, self._half = self._half, b""
        return "\ufffd" if half else ""


def position(token: int) -> PositionLogprobs:
    return PositionLogprobs(chosen=TokenLogprob(token_id=token, logprob=-1.0, rank=1))


def output(text: str | list[int], finish: FinishReason = FINISH_REASON_UNSPECIFIED) -> SequenceOutput:
    ids = [ord(letter) for letter in text] if isinstance(text, str) else text
    return SequenceOutput(token_ids=ids, logprobs=map(position, ids), finish_reason=finish)


def choice(*stops: str, include: bool = False, min_tokens: int = 0) -> ChoiceText:
    rules = TextRules(stops=stops, include_stop=include, min_tokens=min_tokens)
    return ChoiceText(0, Letters(), rules, frozenset({EOS}))


def feed_all(text: ChoiceText, outputs: Sequence[SequenceOutput]) -> tuple[Answer, Delta]:
    answer, last = Answer(), Delta(index=0)
    for one in outputs:
        last = text.feed(one)
        answer.add(last)
        if last.finish_reason is not None:
            break
    return answer, last


def letters(answer: Answer) -> str:
    return "".join(chr(entry.token_id) for entry in answer.entries)


def test_plain_text_passes_at_once_and_length_ends_it() -> None:
    text = choice()
    assert text.feed(output("ab")).text == "ab"
    last = text.feed(output("c", FINISH_REASON_LENGTH))
    assert (last.text, last.finish_reason, last.stop_reason, last.num_tokens) == ("c", "length", None, 3)


def test_the_end_of_sequence_counts_but_is_not_text() -> None:
    answer, last = feed_all(choice(), [output("hi"), output([EOS], FINISH_REASON_STOP)])
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("hi", "stop", None)
    assert letters(answer) == "hi"
    assert answer.token_ids == [ord("h"), ord("i"), EOS]
    assert last.num_tokens == 3


def test_a_stop_token_is_named_and_left_out_unless_it_is_to_be_included() -> None:
    outputs = [output("hi"), output([STOP_TOKEN], FINISH_REASON_STOP)]
    answer, _ = feed_all(choice(), outputs)
    assert (answer.text, answer.stop_reason) == ("hi", STOP_TOKEN)
    included, _ = feed_all(choice(include=True), outputs)
    assert (included.text, letters(included)) == ("hi#", "hi#")


def test_a_stop_string_over_token_borders_is_cut_with_its_tokens() -> None:
    answer, last = feed_all(choice("END"), [output("xE"), output("N"), output("Dyz")])
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("x", "stop", "END")
    assert letters(answer) == "x"
    assert last.num_tokens == 4, "tokens after the match were never asked for"
    assert answer.token_ids == [ord(letter) for letter in "xEND"]


def test_an_included_stop_string_keeps_its_tokens() -> None:
    answer, _ = feed_all(choice("END", include=True), [output("xE"), output("NDy")])
    assert (answer.text, letters(answer)) == ("xEND", "xEND")


def test_log_probabilities_wait_for_their_text() -> None:
    text = choice("END")
    first = text.feed(output("xE"))
    assert (first.text, [entry.token_id for entry in first.entries]) == ("x", [ord("x")])
    second = text.feed(output("a"))
    assert second.text == "Ea"
    assert [(entry.token_id, entry.start, entry.end) for entry in second.entries] == [
        (ord("E"), 1, 2),
        (ord("a"), 2, 3),
    ]


def test_what_was_held_back_comes_with_the_end() -> None:
    answer, _ = feed_all(choice("END"), [output("xEN"), output([EOS], FINISH_REASON_STOP)])
    assert (answer.text, letters(answer), answer.stop_reason) == ("xEN", "xEN", None)
    answer, _ = feed_all(choice("END"), [output("xEN", FINISH_REASON_LENGTH)])
    assert (answer.text, letters(answer), answer.finish_reason) == ("xEN", "xEN", "length")


def test_a_stop_string_is_found_only_after_min_tokens() -> None:
    answer, last = feed_all(choice("b", min_tokens=3), [output("abc"), output("abc")])
    assert (answer.text, last.num_tokens) == ("abca", 5)
    assert letters(answer) == "abca"


def test_half_a_character_waits_and_its_tokens_share_its_place() -> None:
    text = choice()
    assert text.feed(output([ord("a"), 1000 + 0xC3])).text == "a"
    whole = text.feed(output([1000 + 0xA9]))
    assert whole.text == "é"
    assert [(entry.start, entry.end) for entry in whole.entries] == [(1, 1), (1, 2)]


def test_half_a_character_that_begins_a_stop_string_is_cut_with_it() -> None:
    answer, _ = feed_all(choice("é"), [output([ord("a"), 1000 + 0xC3]), output([1000 + 0xA9, ord("z")])])
    assert (answer.text, letters(answer), answer.stop_reason) == ("a", "a", "é")


def test_half_a_character_at_the_end_is_marked() -> None:
    answer, _ = feed_all(choice(), [output([ord("a"), 1000 + 0xC3], FINISH_REASON_LENGTH)])
    assert answer.text == "a\ufffd"
    assert len(answer.entries) == 2


def test_outputs_without_log_probabilities_give_entries_without() -> None:
    delta = choice().feed(SequenceOutput(token_ids=[ord("a")]))
    assert [entry.logprobs for entry in delta.entries] == [None]


@given(
    text=st.text("abc", min_size=1, max_size=14),
    cuts=st.sets(st.integers(1, 13)),
    stops=st.lists(st.text("abc", min_size=1, max_size=3), max_size=2),
    include=st.booleans(),
    min_tokens=st.integers(0, 4),
    finish=st.sampled_from([FINISH_REASON_LENGTH, FINISH_REASON_STOP]),
)
def test_how_many_tokens_come_in_one_output_changes_nothing(
    text: str, cuts: set[int], stops: list[str], include: bool, min_tokens: int, finish: FinishReason
) -> None:
    """A step may give several tokens, a stop string among them; the answer and its length are those of one by one."""
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(borders)]

    def fed(parts: Sequence[str]) -> tuple[Answer, int]:
        endings = [FINISH_REASON_UNSPECIFIED] * (len(parts) - 1) + [finish]
        outputs = [output(part, ending) for part, ending in zip(parts, endings, strict=True)]
        answer, last = feed_all(choice(*stops, include=include, min_tokens=min_tokens), outputs)
        return answer, last.num_tokens

    assert fed(pieces) == fed(list(text))
