"""Stop strings: found across pieces, held back no longer than needed, and independent of where pieces are cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.front.stop_strings import Match, StopStrings

letters = st.text(alphabet="abc", max_size=30)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4)


def shown(stops: list[str], pieces: list[str]) -> tuple[str, Match | None]:
    """All that a client sees, and the match that ended it."""
    watch = StopStrings(stops)
    text = ""
    for piece in pieces:
        safe, match = watch.push(piece)
        text += safe
        assert watch.num_released == len(text)
        if match is not None:
            return text, match
    return text + watch.flush(), None


def first_to_complete(stops: list[str], text: str) -> Match | None:
    """The definition, spelled out: read character by character until some stop string is complete."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return Match(longest, end - len(longest), end)
    return None


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(stop_lists, letters, st.lists(st.integers(0, 30), max_size=8))
def test_any_cutting_gives_what_the_definition_says(stops: list[str], text: str, places: list[int]) -> None:
    match = first_to_complete(stops, text)
    expected = text if match is None else text[: match.start]
    assert shown(stops, cut(text, places)) == (expected, match)
    assert shown(stops, list(text)) == (expected, match)


@given(stop_lists, letters)
def test_only_the_beginning_of_a_stop_string_is_held_back(stops: list[str], text: str) -> None:
    watch = StopStrings(stops)
    safe, match = watch.push(text)
    held = text[len(safe) :]
    if match is None:
        assert not held or any(stop.startswith(held) for stop in stops)
        assert len(held) < max(map(len, stops))


def test_the_example_of_the_docstring() -> None:
    watch = StopStrings(["END"])
    assert watch.push("the E") == ("the ", None)
    assert watch.push("ND") == ("", Match("END", 4, 7))


def test_a_false_alarm_is_released_in_order() -> None:
    watch = StopStrings(["\n\n"])
    assert watch.push("one\n") == ("one", None)
    assert watch.push("two") == ("\ntwo", None)
    assert watch.flush() == ""


def test_what_is_held_at_the_end_is_text() -> None:
    watch = StopStrings(["stop"])
    assert watch.push("don't sto") == ("don't ", None)
    assert watch.flush() == "sto"
    assert watch.num_released == len("don't sto")


def test_characters_are_counted_not_bytes() -> None:
    watch = StopStrings(["。"])
    assert watch.push("好的。再见") == ("好的", Match("。", 2, 3))


def test_without_stop_strings_nothing_is_held() -> None:
    watch = StopStrings([])
    assert watch.push("anything") == ("anything", None)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        StopStrings(["a", ""])
