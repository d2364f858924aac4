"""How long answers take of late, by size of round, and from when on one is overdue.

The times of all replicas lie together. So a deadline follows the load: when everybody slows down, everybody is given
longer; one replica among many that slows down alone hardly moves it. Sizes are powers of two of a round's rows: its
messages share processors, so the round says more about a message's time than the message does. Who is blamed
for an overdue answer is `cluster.replica_health`'s decision.
"""

import math
from dataclasses import dataclass

WINDOW = 256
"""Latest times kept of each size."""

SIZES = 24
"""Sizes told apart; larger rounds count as the largest."""

_REFRESH = 32  # times between two looks at the window
_ENOUGH = 16  # times from which on a size speaks for itself


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeoutPolicy:
    """An answer is overdue after `factor` times the `quantile` of the latest times, but not before `floor_s`.

    Until there are times, after `start_s`; never later than `most_s`.
    """

    factor: float = 3.0
    quantile: float = 0.99
    floor_s: float = 0.05
    start_s: float = 5.0
    most_s: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.quantile <= 1 or not self.factor >= 1:
            raise ValueError(f"quantile is {self.quantile} and factor {self.factor}, expected 0 to 1 and at least 1")
        if not 0 < self.floor_s <= self.start_s <= self.most_s < math.inf:
            raise ValueError(f"floor_s <= start_s <= most_s is expected, got {self}")


def size_of(num_rows: int) -> int:
    """The size of a round with so many rows: 1 for one row, 2 for two or three, 3 for four to seven ..."""
    return min(num_rows.bit_length(), SIZES - 1)


class ServiceTimes:
    """Recent times by size. Adding one costs well under a microsecond; asking costs a look-up."""

    def __init__(self, policy: TimeoutPolicy | None = None) -> None:
        self.policy = policy or TimeoutPolicy()
        self._sizes = [_Size(self.policy) for _ in range(SIZES)]

    def add(self, size: int, seconds: float) -> float:
        """Takes a time in, and returns it as a multiple of what was typical before; 1 for the first."""
        one = self._sizes[size]
        ratio = seconds / one.typical_s if one.typical_s > 0 else 1.0
        one.add(seconds)
        return ratio

    def typical_s(self, size: int) -> float:
        """The median of the latest times of this size; 0 while there are none."""
        return self._sizes[size].typical_s

    def timeout_s(self, size: int) -> float:
        """After how long an answer in a round of this size is overdue."""
        one = self._sizes[size]
        return one.timeout_s if one.count >= _ENOUGH else self._guess_s(size)

    def _guess_s(self, size: int) -> float:
        """From other sizes: a larger round's time is enough, a smaller one's is stretched in proportion to the rows."""
        policy, own = self.policy, self._sizes[size]
        larger = [one.slow_s for one in self._sizes[size + 1 :] if one.count >= _ENOUGH]
        smaller = [one.slow_s * (1 << size - at) for at, one in enumerate(self._sizes[:size]) if one.count >= _ENOUGH]
        if larger:
            guess_s = larger[0]
        elif smaller:
            guess_s = smaller[-1]
        else:
            return policy.start_s
        return min(max(policy.factor * max(guess_s, own.slow_s), policy.floor_s), policy.most_s)


class _Size:
    """A ring of times, with its median and its high quantile as of the last look."""

    __slots__ = ("_look_at", "_policy", "_recent", "count", "slow_s", "timeout_s", "typical_s")

    def __init__(self, policy: TimeoutPolicy) -> None:
        self.count = 0
        self.typical_s = 0.0
        self.slow_s = 0.0
        self.timeout_s = policy.start_s
        self._policy = policy
        self._recent: list[float] = []
        self._look_at = 1

    def add(self, seconds: float) -> None:
        if self.count < WINDOW:
            self._recent.append(seconds)
        else:
            self._recent[self.count % WINDOW] = seconds
        self.count += 1
        if self.count >= self._look_at or seconds > self.timeout_s:
            self._look()

    def _look(self) -> None:
        policy, ordered = self._policy, sorted(self._recent)
        self.typical_s = ordered[len(ordered) // 2]
        self.slow_s = ordered[math.ceil(policy.quantile * len(ordered)) - 1]
        self.timeout_s = min(max(policy.factor * self.slow_s, policy.floor_s), policy.most_s)
        self._look_at = self.count + min(self.count, _REFRESH)
