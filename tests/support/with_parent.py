"""Becomes a command that gets SIGINT when its parent dies: `python with_parent.py COMMAND [ARG ...]`.

Said after exec and not between fork and exec: a test process has threads, and Python must not run between the two.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h

if __name__ == "__main__":
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGINT)
    os.execv(sys.argv[1], sys.argv[1:])
