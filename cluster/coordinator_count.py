"""How many coordinators there should be: by how full they are and whether requests wait, one step at a time.

A pure function of what they say of themselves and a state that is handed on. Starting and ending them is the
supervisor's work, where they go `placement`'s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cluster.retries import Pauses

_GROW = "grow"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorLoad:
    """One coordinator that serves. `used` is the larger of two shares: KV blocks in use, and sequences that run."""

    used: float
    num_waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CountState:
    """What is remembered between two decisions. `grown_s` is None once the last one that was added has come."""

    wanted: int
    changed_s: float = -math.inf
    pressed_since_s: float | None = None
    relaxed_since_s: float | None = None
    grown_s: float | None = None
    pauses: Pauses[str] = field(default_factory=lambda: Pauses(60.0, 1800.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class CountPolicy:
    """The rules. Times in seconds.

    One more after `up_s` in which they were on average fuller than `target_used`, or requests waited at each of them;
    `cooldown_s` lies between two changes. One less after `down_s` in which nobody waited and the others would have been
    less full than `low_share` of the target with its load: so at an even load nothing goes to and fro. One that has not
    come in `give_up_s` is not wanted any more, and the next is asked for after a pause that doubles.
    """

    min_coordinators: int
    max_coordinators: int
    target_used: float = 0.8
    low_share: float = 0.7
    up_s: float = 10.0
    cooldown_s: float = 60.0
    down_s: float = 300.0
    give_up_s: float = 600.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_coordinators <= self.max_coordinators:
            raise ValueError(
                f"min_coordinators is {self.min_coordinators} and max_coordinators {self.max_coordinators}: "
                "at least 1, ascending"
            )
        if not (0 < self.target_used <= 1 and 0 < self.low_share < 1):
            raise ValueError(
                f"target_used is {self.target_used} and low_share {self.low_share}; they must be between 0 and 1"
            )

    def begin(self, num: int) -> CountState:
        """So many at first, within the limits."""
        return CountState(wanted=max(self.min_coordinators, min(self.max_coordinators, num)))

    def decide(self, loads: Sequence[CoordinatorLoad], now_s: float, state: CountState) -> tuple[CountState, str]:
        """The state after one look, and why the number changed, if it did. `loads` are of those that serve."""
        if len(loads) < state.wanted:
            return self._incomplete(now_s, replace(state, pressed_since_s=None, relaxed_since_s=None))
        if state.grown_s is not None:
            state = replace(state, grown_s=None, pauses=replace(state.pauses, entries={}))
        used = sum(one.used for one in loads)
        waits = [one.num_waiting > 0 for one in loads]
        is_pressed = all(waits) or used / len(loads) > self.target_used
        others = max(len(loads) - 1, 1)
        is_relaxed = not any(waits) and used / others < self.target_used * self.low_share
        state = replace(
            state,
            pressed_since_s=_since(state.pressed_since_s, now_s, holds=is_pressed),
            relaxed_since_s=_since(state.relaxed_since_s, now_s, holds=is_relaxed),
        )
        return self._change(used / len(loads), now_s, state)

    def _incomplete(self, now_s: float, state: CountState) -> tuple[CountState, str]:
        """Somebody is on the way, or away: then nothing is decided, but one that never came is given up."""
        if state.grown_s is None or now_s - state.grown_s < self.give_up_s:
            return state, ""
        less = replace(
            state,
            wanted=max(self.min_coordinators, state.wanted - 1),
            grown_s=None,
            changed_s=now_s,
            pauses=state.pauses.failed([_GROW], now_s),
        )
        return less, f"coordinator {state.wanted - 1} has not come in {self.give_up_s:.0f} s"

    def _change(self, mean: float, now_s: float, state: CountState) -> tuple[CountState, str]:
        num = state.wanted
        if now_s - state.changed_s < self.cooldown_s:
            return state, ""
        may_grow = num < self.max_coordinators and _GROW not in state.pauses.paused(now_s)
        if may_grow and _lasted(state.pressed_since_s, now_s, self.up_s):
            why = f"they are {mean:.0%} full" if mean > self.target_used else "requests wait at each of them"
            more = replace(state, wanted=num + 1, changed_s=now_s, grown_s=now_s, pressed_since_s=None)
            return more, f"{num + 1} coordinators instead of {num}: {why}"
        if num > self.min_coordinators and _lasted(state.relaxed_since_s, now_s, self.down_s):
            less = replace(state, wanted=num - 1, changed_s=now_s, relaxed_since_s=None)
            return less, f"{num - 1} coordinators instead of {num}: they are {mean:.0%} full"
        return state, ""


def _since(since_s: float | None, now_s: float, *, holds: bool) -> float | None:
    if not holds:
        return None
    return now_s if since_s is None else since_s


def _lasted(since_s: float | None, now_s: float, at_least_s: float) -> bool:
    return since_s is not None and now_s - since_s >= at_least_s
