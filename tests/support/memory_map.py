"""What a process holds of the machine: descriptors, and mappings of shared rows. By pid; this process without one."""

import os
from pathlib import Path


def num_descriptors(pid: int | None = None) -> int:
    """Open descriptors; for this process without the one that reads the directory."""
    return len(os.listdir(f"/proc/{pid or 'self'}/fd")) - (pid is None)


def num_regions(pid: int | None = None) -> int:
    """Mappings of regions that `actors.shared_rows` made, in whatever process."""
    lines = Path(f"/proc/{pid or 'self'}/maps").read_text().splitlines()
    return sum("memfd:octavo-rows" in line for line in lines)
