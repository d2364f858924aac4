"""Where the time of a start goes: stages with names, which may overlap."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stages:
    """Seconds by stage, in the order in which the stages began. Any thread may run one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the time of the block, also when it raises."""
        began_s = self._clock()
        with self._lock:
            self._seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            with self._lock:
                self._seconds[name] += self._clock() - began_s

    @property
    def total_s(self) -> float:
        """Since the beginning."""
        return self._clock() - self._began_s

    def __str__(self) -> str:
        """`Ray 6.1 s, weights 12.0 s`: what overlaps adds up to more than the whole."""
        with self._lock:
            return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items())
