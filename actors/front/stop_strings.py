"""Finds stop strings in text that arrives in pieces, and holds back what may yet become one.

Pure: no tokens, no requests. The result does not depend on where the pieces were cut: the match that is
complete first ends the text, and of two that are complete at the same character the longer one.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """A stop string found at character `start` of the whole text, `end` excluded."""

    stop: str
    start: int
    end: int


class StopStrings:
    """Watches one text for several stop strings."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self._released = 0

    @property
    def num_released(self) -> int:
        """Characters given out so far."""
        return self._released

    def push(self, text: str) -> tuple[str, Match | None]:
        """Takes more text; returns what is safe to show, and the match that ends the text if there is one.

        Example: with the stop string "END", `push("the E")` gives `("the ", None)` and `push("ND")` gives
        `("", match)`. After a match nothing may be pushed.
        """
        seen, self._held = self._held + text, ""
        match = self._first_match(seen)
        if match is not None:
            safe = seen[: match.start]
            found = Match(match.stop, self._released + match.start, self._released + match.end)
            self._released += len(safe)
            return safe, found
        keep = self._longest_beginning(seen)
        safe, self._held = seen[: len(seen) - keep], seen[len(seen) - keep :]
        self._released += len(safe)
        return safe, None

    def flush(self) -> str:
        """The text ended otherwise: what was held back is text after all."""
        held, self._held = self._held, ""
        self._released += len(held)
        return held

    def _first_match(self, seen: str) -> Match | None:
        found = ((seen.find(stop), stop) for stop in self._stops)
        matches = [Match(stop, start, start + len(stop)) for start, stop in found if start >= 0]
        return min(matches, key=lambda match: (match.end, match.start), default=None)

    def _longest_beginning(self, seen: str) -> int:
        """Characters at the end of `seen` that some stop string begins with."""
        most = min(len(seen), max((len(stop) for stop in self._stops), default=1) - 1)
        sizes = range(most, 0, -1)
        return next((size for size in sizes if any(stop.startswith(seen[-size:]) for stop in self._stops)), 0)
