"""Slows a process: `python throttle.py PID FACTOR PERIOD_MS`, until its standard input ends; then the process runs on.

A script by itself, so that a busy test cannot make its slices longer, and its end, however it comes, continues PID.
"""

import contextlib
import os
import select
import signal
import sys


def main(pid: int, factor: float, period_s: float) -> None:
    """Stops and continues in turn. The wait for the input's end is the clock."""
    run_s = period_s / factor
    try:
        while True:
            os.kill(pid, signal.SIGSTOP)
            if select.select([sys.stdin], [], [], period_s - run_s)[0]:
                return
            os.kill(pid, signal.SIGCONT)
            if select.select([sys.stdin], [], [], run_s)[0]:
                return
    except ProcessLookupError:
        return
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]) / 1000)
