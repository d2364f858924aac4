"""Counters of many processes as one that never goes back, whoever comes, goes or starts again.

A sum over processes falls when one of them ends, which Prometheus takes for a restart of the whole and counts twice.
What each has added since it was last seen only ever grows.
"""

from collections.abc import Hashable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

MAX_REMEMBERED = 16_384


class Increments:
    """Values by whatever names one life of one counter: a process that starts again has another key, or a lower value.

    What there is at the first look that finds anybody was before our time, and is not counted. One that is not seen for
    a while is remembered, unless `MAX_REMEMBERED` others were seen since.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._last: dict[Hashable, float] = {}

    def since_last(self, values: Mapping[Key, float]) -> dict[Key, float]:
        """What each has grown by; who is new has grown by all that it has."""
        first = not self._last
        grown = {}
        for key, value in values.items():
            before = value if first else self._last.pop(key, 0.0)
            grown[key] = value - before if value >= before else value
        for key, value in values.items():
            self._last[key] = value
        while len(self._last) > MAX_REMEMBERED:
            del self._last[next(iter(self._last))]
        self.total += sum(grown.values())
        return grown
