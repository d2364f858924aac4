"""How many calls may be made twice: a share of all calls, with a small reserve for the moment that something breaks.

A token bucket that calls fill and extra calls empty, so that hedging cannot turn a slow cluster into an overloaded
one. Replaying what a broken connection lost is not hedging and needs no leave.
"""


class HedgeBudget:
    """`share` of a token comes with each call, at most `burst` are kept; an extra call costs one.

    So of any run of calls at most `burst` + `share` of them are made twice.
    """

    def __init__(self, share: float = 0.05, burst: int = 32) -> None:
        if not 0 <= share <= 1 or burst < 0:
            raise ValueError(f"share is {share} and burst {burst}, expected 0 to 1 and at least 0")
        self.calls = 0
        """Calls so far, the extra ones not counted. The caller adds to it, since that is done in the hot loop."""
        self.extra = 0
        """Extra calls so far."""
        self.share = share
        self.burst = burst
        self._tokens = float(burst)
        self._counted = 0

    def take(self, count: int = 1) -> bool:
        """Whether so many extra calls may be made; they then count as made."""
        self._tokens = min(self.burst, self._tokens + self.share * (self.calls - self._counted))
        self._counted = self.calls
        if self._tokens < count:
            return False
        self._tokens -= count
        self.extra += count
        return True
