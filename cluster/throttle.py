"""How long to wait between two portions of bytes so that their rate keeps to a bound: a token bucket, as values.

Who waits, and by which clock, is the caller's: loading an expert's weights does, from a peer or from disk.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Throttle:
    """At most `bytes_per_s` in the long run; `burst_bytes` may be had at once after a pause."""

    bytes_per_s: float
    burst_bytes: float

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0 or not self.burst_bytes >= 0:
            raise ValueError(f"{self.bytes_per_s} bytes/s with bursts of {self.burst_bytes}: expected > 0 and >= 0")


@dataclass(frozen=True, slots=True)
class ThrottleState:
    """What could be had at once at time `at_s`; negative is a debt, which time pays off."""

    credit_bytes: float
    at_s: float


def begin(throttle: Throttle, now_s: float) -> ThrottleState:
    """A full bucket."""
    return ThrottleState(throttle.burst_bytes, now_s)


def take(throttle: Throttle, state: ThrottleState, num_bytes: int, now_s: float) -> tuple[float, ThrottleState]:
    """Takes a portion of any size; returns the seconds to wait before it is used, and the next state.

    However the portions are cut: who waits as told uses, in any T seconds, at most `bytes_per_s` · T + `burst_bytes`
    and one portion. A clock that goes back gives nothing and takes nothing.

    >>> throttle = Throttle(bytes_per_s=100.0, burst_bytes=50.0)
    >>> wait_s, state = take(throttle, begin(throttle, 0.0), 80, 0.0)
    >>> wait_s, state.credit_bytes
    (0.3, -30.0)
    >>> take(throttle, state, 20, 0.3)
    (0.2, ThrottleState(credit_bytes=-20.0, at_s=0.3))
    """
    passed_s = max(0.0, now_s - state.at_s)
    credit = min(throttle.burst_bytes, state.credit_bytes + passed_s * throttle.bytes_per_s) - num_bytes
    return max(0.0, -credit / throttle.bytes_per_s), ThrottleState(credit, max(now_s, state.at_s))
