"""Guesses come from the sequence's own text, from the longest and latest match, at a bounded cost."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.prompt_lookup import MAX_CANDIDATES, PromptLookup, PromptLookupConfig

TOKENS = st.lists(st.integers(0, 3), max_size=60)


def guess(tokens: Sequence[int], limit: int = 4, ngram_min: int = 2, ngram_max: int = 4) -> tuple[int, ...]:
    lookup = PromptLookup(ngram_min, ngram_max)
    lookup.extend(tokens)
    return lookup.propose(limit)


def test_what_followed_the_last_tokens_before_is_guessed() -> None:
    assert guess([1, 2, 3, 4, 5, 6, 9, 1, 2]) == (3, 4, 5, 6)
    assert guess([1, 2, 3, 4, 5, 6, 9, 1, 2], limit=1) == (3,)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 2], [1, 2, 9, 2, 1]])
def test_nothing_is_guessed_where_the_last_tokens_are_new(tokens: list[int]) -> None:
    assert guess(tokens) == ()


def test_the_longest_match_wins_and_the_latest_of_equals() -> None:
    assert guess([7, 1, 2, 50, 8, 1, 2, 60, 7, 1, 2], limit=1) == (50,), "7 1 2 is longer than 1 2"
    assert guess([7, 1, 2, 50, 8, 1, 2, 60, 9, 1, 2], limit=1) == (60,)
    assert guess([7, 1, 2, 50, 8, 1, 2, 60, 7, 1, 2], limit=1, ngram_max=2) == (60,), "no more than 2 count"


def test_a_guess_that_reaches_the_end_goes_on_with_itself() -> None:
    assert guess([9, 9, 9], limit=5) == (9,) * 5
    assert guess([1, 2, 3, 1, 2], limit=7) == (3, 1, 2, 3, 1, 2, 3)


def test_only_so_many_places_are_compared() -> None:
    """The longest match lies further back than is looked: the latest of those that are seen is taken."""
    near = [1, 2, 60] * MAX_CANDIDATES
    assert guess([7, 7, 1, 2, 50, *near, 7, 7, 1, 2], limit=1) == (60,)
    assert guess([7, 7, 1, 2, 50, *near[3:], 7, 7, 1, 2], limit=1) == (50,)


def test_single_tokens_and_the_largest_ids_are_matched() -> None:
    top = 2**32 - 1
    assert guess([top, 5, top], limit=1, ngram_min=1, ngram_max=1) == (5,)
    assert guess([top, 0, 5, 0, top, 0], limit=1) == (5,)


@given(tokens=TOKENS, cuts=st.lists(st.integers(0, 60)), limit=st.integers(1, 6))
def test_it_does_not_matter_in_which_pieces_tokens_come(tokens: list[int], cuts: list[int], limit: int) -> None:
    lookup = PromptLookup(2, 3)
    for cut in sorted(cuts):
        lookup.extend(tokens[len(lookup) : cut])
        lookup.propose(limit)
    lookup.extend(tokens[len(lookup) :])
    assert len(lookup) == len(tokens)
    assert lookup.propose(limit) == guess(tokens, limit, 2, 3)


@given(tokens=TOKENS, limit=st.integers(1, 9), ngram_min=st.integers(1, 3), more=st.integers(0, 3))
def test_a_guess_is_what_a_plain_search_finds(tokens: list[int], limit: int, ngram_min: int, more: int) -> None:
    assert guess(tokens, limit, ngram_min, ngram_min + more) == plain_search(tokens, limit, ngram_min, ngram_min + more)


def plain_search(tokens: list[int], limit: int, ngram_min: int, ngram_max: int) -> tuple[int, ...]:
    """The same by comparing slices at every place, the latest MAX_CANDIDATES of which count."""
    known = len(tokens)
    ends = [end for end in range(known - 1, ngram_min - 1, -1) if ends_alike(tokens, end, ngram_min)]
    for length in range(ngram_max, ngram_min - 1, -1):
        for end in ends[:MAX_CANDIDATES]:
            if ends_alike(tokens, end, length):
                text = list(tokens)
                for index in range(limit):
                    text.append(text[end + index])
                return tuple(text[known:])
    return ()


def ends_alike(tokens: list[int], end: int, length: int) -> bool:
    return end >= length and tokens[end - length : end] == tokens[len(tokens) - length :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens is 0, but must be at least 1"),
        ({"ngram_min": 0}, "ngram_min is 0"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"ngram_min": 5}, r"ngram_min is 5, but must be at most ngram_max \(4\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptLookupConfig(**{"tokens": 4, "ngram_max": 4, "ngram_min": 2, "max_batch": 4, **changes})
