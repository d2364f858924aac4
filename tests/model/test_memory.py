"""Freed memory goes back to the system."""

import subprocess
import sys

PROGRAM = """
from model.memory import release_freed_memory

def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))

pieces = [bytes(60_000) for _ in range(2000)]
kept = pieces[::100]
held = resident()
del pieces
release_freed_memory()
print(held - resident(), len(kept))
"""


def test_holes_between_living_pieces_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    freed_bytes, kept = map(int, done.stdout.split())
    assert kept == 20
    assert freed_bytes > 80e6, f"only {freed_bytes} of 118800000 bytes were given back"
