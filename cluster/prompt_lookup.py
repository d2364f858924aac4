"""Prompt lookup: guesses a sequence's next tokens from where its last ones stood before.

Who summarises, edits or quotes repeats what has been said, so the tokens that followed the last n-gram earlier
are likely to follow it again (prompt lookup decoding, Saxena 2023; "inference with reference", arXiv
2304.04487). A guess costs no model. Whether it is true is found by computing it: what becomes of guesses is
`cluster.scheduler`'s business, and how many fit in a step `cluster.step_plan`'s.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

MAX_CANDIDATES = 16
"""Earlier places that are compared, latest first, so that a guess costs no more in a long text than in a short one."""
_TOKEN_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLookupConfig:
    """`tokens` are guessed at most per sequence and step, after a match of `ngram_min` to `ngram_max` tokens.

    With more than `max_batch` sequences running nothing is guessed: then arithmetic is what a step waits for,
    and wrong guesses are paid in full.
    """

    tokens: int
    ngram_max: int
    ngram_min: int
    max_batch: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        if self.ngram_min > self.ngram_max:
            raise ValueError(f"ngram_min is {self.ngram_min}, but must be at most ngram_max ({self.ngram_max})")


class PromptLookup:
    """The known tokens of one sequence, indexed by their n-grams: about 150 bytes a token.

    Places with the same last `ngram_min` tokens are chained, latest first, as in LZ77 compressors. Taking a
    token and guessing are both O(1).
    """

    def __init__(self, ngram_min: int, ngram_max: int) -> None:
        self._shortest = ngram_min
        self._longest = ngram_max
        self._tokens = array("Q")
        self._latest: dict[int, int] = {}  # n-gram of the shortest kind -> the latest place after it
        self._earlier = array("Q", [0])  # place -> the place before it with the same n-gram; 0 is none
        self._ngram = 0
        self._mask = (1 << _TOKEN_BITS * ngram_min) - 1

    def __len__(self) -> int:
        """Tokens taken."""
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Take the tokens that follow."""
        for token in tokens:
            self._tokens.append(token)
            self._ngram = (self._ngram << _TOKEN_BITS | token) & self._mask
            place = len(self._tokens)
            if place < self._shortest:
                self._earlier.append(0)
                continue
            self._earlier.append(self._latest.get(self._ngram, 0))
            self._latest[self._ngram] = place

    def propose(self, limit: int) -> tuple[int, ...]:
        """Up to `limit` tokens that may follow; none where the last `ngram_min` tokens are new.

        Example: after 1 2 3 9 1 2, with n-grams of 2, the guess is 3 9 1 2 3 9 ...: a guess that reaches the
        end of what is known goes on with itself.
        """
        place = self._best_place()
        if not place:
            return ()
        tokens, known = self._tokens, len(self._tokens)
        period = known - place
        return tuple(tokens[place + index % period] for index in range(limit))

    def _best_place(self) -> int:
        """The place after the longest match with the last tokens, the latest of equals; 0 is none."""
        best, best_length = 0, 0
        place = self._earlier[-1]
        for _ in range(MAX_CANDIDATES):
            if not place:
                break
            length = self._match_length(place)
            if length > best_length:
                best, best_length = place, length
            if length == self._longest:
                break
            place = self._earlier[place]
        return best

    def _match_length(self, place: int) -> int:
        """How many tokens before `place` are the last ones, at least `ngram_min`, at most `ngram_max`."""
        tokens, known, length = self._tokens, len(self._tokens), self._shortest
        while length < min(self._longest, place) and tokens[place - length - 1] == tokens[known - length - 1]:
            length += 1
        return length
