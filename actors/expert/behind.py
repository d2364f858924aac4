"""Work that has the processors when others leave them: threads that stand behind, and end.

What is done here is what nobody waits for this second: importing, reading and packing in a process that is only about
to serve. Linux only; elsewhere such a thread is an ordinary one. What may be done so is the callers' to know: a thread
that stands behind and holds Python's lock makes every other thread of its process wait with it.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")

NICE = 10
"""Added to the thread's own: a tenth of what an ordinary thread gets where there is not enough for all, so that
whatever is begun ends in bounded time. The idle policy would get three hundredths of a tenth of that.
"""


def step_back() -> None:
    """The calling thread, and those that it starts from now on, stand behind.

    There is no way back: without privileges a thread may lower its priority and never raise it again. So it must be
    one that ends, and others keep theirs.
    """
    with contextlib.suppress(OSError, AttributeError):
        tid = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, tid, min(19, os.getpriority(os.PRIO_PROCESS, tid) + NICE))
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def run_behind(work: Callable[[], Result]) -> Result:
    """Returns or raises what `work` does in a thread of its own, which stands behind."""
    result: Future[Result] = Future()

    def run() -> None:
        step_back()
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is handed to the waiting caller, whatever it is
            result.set_exception(error)

    thread = threading.Thread(target=run, name="behind")
    thread.start()
    thread.join()
    return result.result()
