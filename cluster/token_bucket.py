"""A rate per minute as a bucket that fills steadily: what may be taken now, and when there will be enough.

Who is limited, and what a refusal says, is `actors.front.accounts`' work. Times are seconds on any clock that does not
run backwards.
"""

from math import inf


class TokenBucket:
    """Holds at most a minute's worth, and that to begin with. `per_minute` may be changed; 0 lets nothing through."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        """How much is in it; below 0 where more was used than there was."""
        filled = self._level + (now_s - self._at_s) * self.per_minute / 60
        self._level = min(float(self.per_minute), filled)
        self._at_s = now_s
        return self._level

    def take(self, amount: float, now_s: float) -> bool:
        """Takes `amount` if so much is in it."""
        if self.level(now_s) < amount:
            return False
        self._level -= amount
        return True

    def put(self, amount: float, now_s: float) -> None:
        """Gives back what was not used; a negative amount is what was used beyond what was taken."""
        self._level = min(float(self.per_minute), self.level(now_s) + amount)

    def wait_s(self, amount: float, now_s: float) -> float:
        """When there will be `amount`; infinite where it never holds so much."""
        missing = amount - self.level(now_s)
        if missing <= 0:
            return 0.0
        return inf if amount > self.per_minute else missing * 60 / self.per_minute

    def full_s(self, now_s: float) -> float:
        """When it will be full."""
        return self.wait_s(float(self.per_minute), now_s)
