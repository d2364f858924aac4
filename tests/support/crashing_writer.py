"""Run as a program: write one small checkpoint again and again, each time dying a step later.

`python -m tests.support.crashing_writer DEST` makes DEST/0, DEST/1, …: in DEST/k the writing process is
ended, with no clean-up of any kind, when it is about to make its k-th call that touches the file system. The
last directory is the first whose writer came to its end; the number of directories is printed.
"""

import os
import sys
from pathlib import Path

import torch

from model.storage.checkpoint_writer import ShardedWriter

CRASHED = 9
TENSORS = {f"tensor.{i}": torch.full((3, 4), float(i)) for i in range(5)}
SHARD_BYTES = 2 * TENSORS["tensor.0"].nbytes


def write(dest: Path) -> None:
    """Three shards, none full to the byte but the first two."""
    with ShardedWriter(dest, max_shard_bytes=SHARD_BYTES, metadata={"format": "pt"}) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)


def write_and_die(dest: Path, step: int) -> None:
    """End this process at the `step`-th file system call, counted as Python audits them (PEP 578)."""
    left = step

    def count(event: str, _: tuple[object, ...]) -> None:
        nonlocal left
        if event == "open" or event.startswith(("os.", "fcntl.", "glob.", "pathlib.")):
            left -= 1
            if left < 0:
                os._exit(CRASHED)

    sys.addaudithook(count)
    write(dest)


def main(dest: str) -> None:
    step = 0
    while True:
        child = os.fork()
        if child == 0:
            write_and_die(Path(dest, str(step)), step)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        step += 1
        if code != CRASHED:
            break
    print(step)
    sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
