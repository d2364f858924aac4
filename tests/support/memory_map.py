"""What a process holds of the machine: descriptors, and mappings of shared rows. By pid; this process without one."""

import gc
import os
from pathlib import Path


def num_descriptors(pid: int | None = None) -> int:
    """Open files, memory and Unix sockets; not what gRPC opens and closes in its own time, TCP sockets and events."""
    if pid is None:
        gc.collect()
    unix = {f"socket:[{line.split()[6]}]" for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    targets = [_target(entry) for entry in Path(f"/proc/{pid or 'self'}/fd").iterdir()]
    return sum(bool(one) and (not one.startswith(("socket:", "anon_inode:")) or one in unix) for one in targets)


def num_regions(pid: int | None = None) -> int:
    """Mappings of regions that `actors.shared_rows` made, in whatever process."""
    if pid is None:
        gc.collect()
    lines = Path(f"/proc/{pid or 'self'}/maps").read_text().splitlines()
    return sum("memfd:octavo-rows" in line for line in lines)


def _target(entry: Path) -> str:
    try:
        return os.readlink(entry)
    except OSError:
        return ""  # closed meanwhile, as the one that read the directory
