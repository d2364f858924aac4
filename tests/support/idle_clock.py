"""An event loop whose clock stands still while there is work: it goes on only when all wait for it, and at once.

For tests of deadlines and pauses without sockets, threads and processes: however slow the machine is, nothing is late,
and nothing is waited for in earnest.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _NoWaiting(selectors.DefaultSelector):
    """Tells how long it would have waited instead of waiting."""

    passed_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits for somebody who is not in this loop"
        self.passed_s += max(timeout, 0.0)
        return super().select(0)


class IdleClockLoop(asyncio.SelectorEventLoop):
    """`time` is in seconds from `began_s` on, which is as far from 0 as a machine's clock usually is."""

    def __init__(self, began_s: float = 1000.0) -> None:
        self._idle = _NoWaiting()
        self._began_s = began_s
        super().__init__(self._idle)

    def time(self) -> float:
        return self._began_s + self._idle.passed_s


def run_idle(work: Coroutine[Any, Any, None], timeout_s: float = 3600.0) -> None:
    """Runs a test's coroutine in such a loop; the bound, by that clock, is for one that hangs: it ends at once."""

    async def bounded() -> None:
        async with asyncio.timeout(timeout_s):
            await work

    with asyncio.Runner(loop_factory=IdleClockLoop) as runner:
        runner.run(bounded())
