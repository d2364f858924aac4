"""Runs one decoder on damaged inputs, and counts every way in which it breaks its word.

What may break it for good (a native crash, memory for the whole machine) is met by running this in a process of its
own with a limit on memory: `tests.fuzz.workers`.
"""

import resource
import signal
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

from tests.fuzz.mutation import damaged
from tests.fuzz.target import Target

WEIGH_EVERY = 32
"""Of so many inputs one is weighed: tracing allocations costs more than most decoders do."""
MAX_SHOWN = 5
IDLE_TIMES = 20
"""A decoder has `max_s` seconds of the processor; of waiting so many times that, since the machine may have others."""


class TooSlow(BaseException):
    """A decoder ran for longer than it may. No decoder's own handlers catch it."""


@dataclass
class Report:
    """What a campaign says of one decoder; sizes in bytes."""

    decoder: str
    executions: int = 0
    accepted: int = 0
    crashes: int = 0
    seconds: float = 0.0
    max_rss_growth: int = 0
    max_allocated: int = 0
    shown: list[str] = field(default_factory=list)

    def line(self) -> dict[str, Any]:
        """As JSON; `shown` is for people."""
        return {name: value for name, value in asdict(self).items() if name != "shown"}

    def crash(self, number: int, why: str) -> None:
        """Notes that input `number` made the decoder break its word."""
        self.crashes += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append(f"{self.decoder}: input {number}: {why}")


def run(
    target: Target,
    *,
    executions: int,
    seed: int,
    first: int = 0,
    weigh_every: int = WEIGH_EVERY,
    before: Callable[[int], None] = lambda number: None,
) -> Report:
    """Decodes inputs `first` .. of a campaign. `before` is called with each number. Main thread only."""
    report = Report(target.name)
    before_bytes = _max_rss()
    began = time.monotonic()
    with _alarms():
        for number in range(first, first + executions):
            before(number)
            data = damaged(target, seed, number)
            weighed = number % weigh_every == 0
            report.executions += 1
            _one(target, data, number, report, weighed=weighed)
    report.seconds = round(time.monotonic() - began, 3)
    report.max_rss_growth = max(0, _max_rss() - before_bytes)
    return report


def _one(target: Target, data: bytes, number: int, report: Report, *, weighed: bool) -> None:
    if weighed:
        tracemalloc.start()
    try:
        signal.setitimer(signal.ITIMER_PROF, target.max_s)
        signal.setitimer(signal.ITIMER_REAL, target.max_s * IDLE_TIMES)
        target.decode(data)
        report.accepted += 1
    except target.errors:
        pass
    except KeyboardInterrupt:
        raise
    except TooSlow:
        report.crash(number, f"took more than {target.max_s:g} s")
    except BaseException:  # noqa: BLE001 - Rust panics are no Exceptions
        report.crash(number, traceback.format_exc(limit=-3))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if weighed:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            report.max_allocated = max(report.max_allocated, peak)
            if peak > target.max_bytes(len(data)):
                report.crash(number, f"allocated {peak} bytes for {len(data)}, at most {target.max_bytes(len(data))}")


@contextmanager
def _alarms() -> Iterator[None]:
    def too_slow(_number: int, _frame: FrameType | None) -> None:
        raise TooSlow

    old = {number: signal.signal(number, too_slow) for number in (signal.SIGALRM, signal.SIGPROF)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _max_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
