"""Faults on a process of one's own: what was frozen or slowed runs on, however the block ends."""

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import pytest

from tests.chaos import faults
from tests.chaos.clusters import alive
from tests.chaos.player import wait_until

ECHO = "import sys\nfor line in sys.stdin.buffer: sys.stdout.buffer.write(line); sys.stdout.buffer.flush()"


@asynccontextmanager
async def echo_process() -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", ECHO, stdin=PIPE, stdout=PIPE)
    try:
        await says(process)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def says(process: Process) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"x\n")
    async with asyncio.timeout(60):
        assert await process.stdout.readline() == b"x\n"


def stopped(pid: int) -> bool:
    return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)


async def freeze_and_fail(pid: int) -> None:
    with faults.frozen(pid):
        await wait_until(lambda: stopped(pid), 60, "stopped")
        raise RuntimeError


def test_frozen_is_silent_and_then_runs_on() -> None:
    async def main() -> None:
        async with echo_process() as process:
            with pytest.raises(RuntimeError):
                await freeze_and_fail(process.pid)
            await says(process)

    asyncio.run(main())


def test_slowed_answers_all_the_same_and_then_runs_on() -> None:
    async def main() -> None:
        async with echo_process() as process:
            async with faults.slowed(process.pid, 10.0):
                await wait_until(lambda: stopped(process.pid), 60, "stopped in turn")
                await says(process)
            assert not stopped(process.pid)
            await says(process)

    asyncio.run(main())


def test_killed_in_mid_message_is_dead() -> None:
    async def main() -> None:
        async with echo_process() as process:
            await faults.kill_in_mid_message(process.pid, hold_s=0.01)
            async with asyncio.timeout(60):
                await process.wait()
            assert not alive(process.pid)
            faults.kill(process.pid)  # gone already: no error
            async with faults.slowed(process.pid, 10.0):
                pass

    asyncio.run(main())
