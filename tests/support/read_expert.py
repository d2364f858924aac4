"""Run as a program: read one expert's tensors as an actor would, and report bytes and memory as JSON.

`python -m tests.support.read_expert MODEL_DIR EXPERT [DTYPE]`. Linux only: it asks /proc.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch

from model.storage.checkpoint import Checkpoint, Expert


def bytes_read() -> int:
    """Bytes this process got from `read` and its kin, page cache or not (proc(5), /proc/pid/io, rchar)."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def memory_bytes(field: str) -> int:
    """`VmRSS` now, or its peak `VmHWM`."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def main(model_dir: str, expert: str, dtype: str | None = None) -> None:
    before_open = bytes_read()
    checkpoint = Checkpoint.open(model_dir)
    opening = bytes_read() - before_open
    owner = Expert(int(expert))
    target_dtype = None if dtype is None else getattr(torch, dtype)
    torch.empty(1, dtype=torch.bfloat16).to(target_dtype)  # what the first conversion sets up is not the weights'
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    memory, read = memory_bytes("VmRSS"), bytes_read()
    column = {name: checkpoint.read(name, dtype=target_dtype) for name in checkpoint.names(owner)}
    read, peak = bytes_read() - read, memory_bytes("VmHWM")
    digest = hashlib.sha256()
    for tensor in column.values():
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    report = {
        "open_bytes": opening,
        "read_bytes": read,
        "owned_bytes": checkpoint.owned_bytes(owner),
        "held_bytes": sum(tensor.nbytes for tensor in column.values()),
        "largest_bytes": max(tensor.nbytes for tensor in column.values()),
        "peak_bytes": peak - memory,
        "digest": digest.hexdigest(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
