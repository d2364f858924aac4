"""How much memory processes hold together, every shared page counted once (PSS), and the bar for a cluster."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import psutil

PROCESS_BYTES = 350_000_000
WEIGHTS_FACTOR = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """`pss_bytes` of all `num_processes`; `bar_bytes` = 1.25 · weights in the kernel's precision + 350 MB a process.

    `weight_bytes` is 0 for a peer, which has no bar.
    """

    num_processes: int
    pss_bytes: int
    weight_bytes: int = 0

    @property
    def bar_bytes(self) -> int:
        return round(WEIGHTS_FACTOR * self.weight_bytes) + PROCESS_BYTES * self.num_processes

    def to_json(self) -> dict[str, object]:
        """Plain values under stable names."""
        facts: dict[str, object] = asdict(self)
        if self.weight_bytes:
            facts |= {"bar_bytes": self.bar_bytes, "within_bar": self.pss_bytes <= self.bar_bytes}
        return facts


def proportional_bytes(pid: int) -> int:
    """PSS of one process, which the kernel adds up from its mappings; shared memory is split among its users."""
    return int(psutil.Process(pid).memory_full_info().pss)


def memory_use(
    pids: Sequence[int], weight_bytes: int = 0, read: Callable[[int], int] = proportional_bytes
) -> MemoryUse:
    """Of all `pids` together. Raises psutil.Error for one that is gone."""
    return MemoryUse(num_processes=len(pids), pss_bytes=sum(map(read, pids)), weight_bytes=weight_bytes)
