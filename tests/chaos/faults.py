"""What is done to processes: killed, frozen, slowed. Whatever is frozen or slowed is let go at the block's end."""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

THROTTLE = Path(__file__).with_name("throttle.py")


def kill(pid: int) -> None:
    """SIGKILL; a process that is gone is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """SIGSTOP now, SIGCONT at the end. Its sockets stay open and its kernel goes on acknowledging."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def kill_in_mid_message(pid: int, hold_s: float = 0.05) -> None:
    """Kills a process that holds a message unanswered: frozen until one has surely come, then killed."""
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(hold_s)
    kill(pid)


@contextlib.asynccontextmanager
async def slowed(pid: int, factor: float, period_ms: float = 4.0) -> AsyncIterator[None]:
    """The process runs one `factor`-th of the time, in slices of `period_ms`: a helper stops and continues it.

    Cgroups would do it too, but Ray's processes share one, and not every container may write there.
    """
    command = (sys.executable, "-S", str(THROTTLE), str(pid), str(factor), str(period_ms))
    helper = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=DEVNULL)
    try:
        yield
    finally:
        assert helper.stdin is not None
        helper.stdin.close()
        await helper.wait()
