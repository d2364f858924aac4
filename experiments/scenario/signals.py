"""Faults of a live scenario: signals to the process of an expert's first replica."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable

from actors.supervision.status import ClusterStatus
from experiments.scenario.schema import Fault

PERIOD_S = 0.02  # of a slowed process: it runs a part of every period


async def strike(fault: Fault, status: Callable[[], Awaitable[ClusterStatus]], origin_s: float) -> None:
    """Waits for the fault's time (on `time.monotonic`, from `origin_s`) and does it, if the process is still there."""
    await asyncio.sleep(max(origin_s + fault.at_s - time.monotonic(), 0.0))
    pid = first_replica(await status(), fault.expert)
    if pid is None:
        return
    if fault.kind == "kill":
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return
    await slowed(pid, fault.factor, fault.for_s)


def first_replica(status: ClusterStatus, expert: int) -> int | None:
    """The process of the first ready replica, by id, that holds the expert."""
    found = sorted((r.replica_id, r.pid) for r in status.replicas if expert in r.expert_ids and r.state == "ready")
    return found[0][1] if found else None


async def slowed(pid: int, factor: float, for_s: float) -> None:
    """The process runs one `factor`-th of the time, then freely again, also when this is cancelled."""
    end_s = time.monotonic() + for_s
    try:
        while time.monotonic() < end_s:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(PERIOD_S * (1 - 1 / factor))
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(PERIOD_S / factor)
    except ProcessLookupError:
        return
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
