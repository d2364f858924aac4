"""How long a newcomer would wait to start: behind those who wait for a place, and behind prompts not yet computed.

The pace is that of recent admissions and full steps; before there are any, it is guessed from how long sequences ran.
Bounds, and who is refused, are `cluster.waiting_queue`'s. Rates are per second, times on the scheduler's clock.
"""

import math
from collections import deque
from dataclasses import dataclass

RATE_WINDOW_S = 30.0
"""How far back admissions count towards the rate."""

MAX_STRAIN_S = 60.0
"""Longer strain is forgotten, so that the calm after it need not last longer to count."""

_MAX_EVENTS = 1024
_MEMORY = 0.1  # weight of the newest in the means
_LEAST_WEIGHT_S = 1.0  # of the past, against what is seen now
_FEW = 4  # as many may be about to start before their prompts are weighed


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """A step of `num_tokens` was planned; then so many run, `num_starting` of them without a token so far.

    `backlog` are the tokens of those running that are neither computed nor in the step; `num_waiting` found no place.
    """

    num_tokens: int
    num_running: int
    num_starting: int
    num_waiting: int
    backlog: int


_NOTHING = PlannedStep(num_tokens=0, num_running=0, num_starting=0, num_waiting=0, backlog=0)


class QueuePace:
    """`slots` sequences may run at a time, a step has at most `step_tokens` tokens."""

    def __init__(self, slots: int, step_tokens: int) -> None:
        self.now_s = 0.0
        self._slots = slots
        self._step_tokens = step_tokens
        self._step = _NOTHING
        self._step_s = 0.0
        self._strain_s = 0.0
        self._busy_since_s: float | None = None
        self._admitted: deque[tuple[float, int]] = deque(maxlen=_MAX_EVENTS)
        self._run_s: float | None = None
        self._company: float | None = None
        self._tokens_per_s: float | None = None
        self._fresh_share = 1.0

    @property
    def strain_s(self) -> float:
        """For how long newcomers could not have started at once, less the time since then that they could have."""
        return self._strain_s

    def restart(self) -> None:
        """The queue was empty: what was seen while somebody waited is over."""
        self._busy_since_s = None
        self._admitted.clear()

    def observe(self, now_s: float) -> None:
        """Tell the time, before a step is planned. Admissions older than RATE_WINDOW_S do not count."""
        took_s = now_s - self._step_s
        if self._step.num_tokens * 2 >= self._step_tokens and took_s > 0:
            self._tokens_per_s = _mean(self._tokens_per_s, self._step.num_tokens / took_s)
        calm = not self._step.num_waiting and self._step.backlog <= self._step_tokens
        self._strain_s = max(0.0, min(MAX_STRAIN_S, self._strain_s + (-took_s if calm else took_s)))
        if self._busy_since_s is None:
            self._busy_since_s = now_s
        self.now_s = now_s
        while self._admitted and self._admitted[0][0] < now_s - RATE_WINDOW_S:
            self._admitted.popleft()

    def note_admitted(self, num_tokens: int, num_cached: int = 0) -> None:
        """Somebody with so many tokens, of which some were computed already, left the queue to run."""
        self._admitted.append((self.now_s, num_tokens))
        self._fresh_share += _MEMORY * (1 - num_cached / num_tokens - self._fresh_share)

    def note_plan(self, step: PlannedStep) -> None:
        """A step was planned."""
        self._step, self._step_s = step, self.now_s

    def note_end(self, admitted_s: float) -> None:
        """A sequence has ended that has run since `admitted_s`."""
        self._company = _mean(self._company, max(1, self._step.num_running))
        self._run_s = _mean(self._run_s, self.now_s - admitted_s)

    def start_wait_s(self, num_waiting: int, num_tokens: int) -> float:
        """Seconds until a newcomer behind so many in the queue, with so many tokens, starts: an estimate."""
        return max(self._place_wait_s(num_waiting), self._prompt_wait_s(num_waiting, num_tokens))

    def _place_wait_s(self, num_waiting: int) -> float:
        """Until it has a place. 0 where there is one, or where it would be the first in the queue.

        Before anything ran to its end, as many may wait as can run; then infinite.
        """
        step = self._step
        ahead = num_waiting + 1 - (0 if step.num_waiting else self._slots - step.num_running)
        if ahead <= 1:
            return 0.0
        rate = self.rate()
        if rate is None:
            return 0.0 if ahead <= self._slots else math.inf
        return ahead / rate if rate > 0 else math.inf

    def _prompt_wait_s(self, num_waiting: int, num_tokens: int) -> float:
        """Until the prompts before it are computed, as far as prompts lately were. 0 where they are few, or fit into
        a step.
        """
        tokens = self._step.backlog + num_tokens * self._fresh_share
        few = self._step.num_starting + num_waiting < _FEW
        if few or tokens <= self._step_tokens or self._tokens_per_s is None:
            return 0.0
        return tokens / self._tokens_per_s

    def rate(self) -> float | None:
        """Sequences that start per second while somebody waits; None before anything is known.

        The past counts as if it had been seen for as long as a sequence took. It saw fewer sequences side by side
        than run now; what all get done together grows about with the root of their number.
        """
        elapsed_s = min(self._busy_s(), RATE_WINDOW_S)
        if self._run_s is None or self._company is None:
            return len(self._admitted) / elapsed_s if elapsed_s and self._admitted else None
        run_s = max(self._run_s, 1e-3)
        weight_s = max(run_s, _LEAST_WEIGHT_S)
        past = math.sqrt(self._company * max(1, self._step.num_running)) / run_s
        return (len(self._admitted) + past * weight_s) / (elapsed_s + weight_s)

    def seconds_for(self, sequences: int, tokens: int) -> float:
        """How long so many of either take to leave, as fast as they lately did; 0 before anything was seen."""
        if self._busy_s() <= 0:
            return 0.0
        start_s = max(self.now_s - self._busy_s(), self.now_s - RATE_WINDOW_S)
        if len(self._admitted) == _MAX_EVENTS:
            start_s = max(start_s, self._admitted[0][0])
        elapsed_s = self.now_s - start_s
        left = ((sequences, len(self._admitted)), (tokens, sum(count for _, count in self._admitted)))
        return max((wanted * elapsed_s / seen if seen else math.inf) for wanted, seen in left if wanted > 0)

    def _busy_s(self) -> float:
        return 0.0 if self._busy_since_s is None else self.now_s - self._busy_since_s


def _mean(before: float | None, newest: float) -> float:
    return newest if before is None else before + _MEMORY * (newest - before)
