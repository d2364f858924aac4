"""Freed memory goes back to the system; what is kept moves to huge pages, with its contents."""

import subprocess
import sys
from pathlib import Path

import pytest

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

HUGE = """
import torch
from model.memory import collapse_into_huge_pages

def huge():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages:"))

before = huge()
weights = [torch.full((1_770_000 // 4,), float(index)) for index in range(40)]  # each smaller than a huge page
turned = collapse_into_huge_pages()
assert all(bool((weight == index).all()) for index, weight in enumerate(weights))
print(turned, huge() - before)
"""


def test_holes_between_living_pieces_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    freed_bytes, kept = map(int, done.stdout.split())
    assert kept == 20
    assert freed_bytes > 80e6, f"only {freed_bytes} of 118800000 bytes were given back"


def test_pieces_smaller_than_a_huge_page_fill_some_together_and_keep_their_contents() -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("this system gives no huge pages")
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, check=True)
    turned, grown = map(int, done.stdout.split())
    if turned < 48 << 20:
        pytest.skip(f"this system cannot collapse pages (Linux before 6.1), or has few to give: {turned} bytes")
    assert grown > 40 << 20, f"{turned} bytes were said to be turned, the system counts {grown}"
