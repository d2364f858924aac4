"""Times on a GPU, and the two ceilings they are held to: bytes a second, and operations a second, measured here.

Device work is asynchronous: it is timed with events around many calls, after some that do not count.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch

_COPY_BYTES = 4 << 30
_PRODUCT_WIDTH = 8192


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Of one card: a large copy (bytes read and written), and a large product of random bf16 matrices."""

    device: str
    copy_bytes_s: float
    bf16_flop_s: float

    def to_json(self) -> dict[str, object]:
        """A line of the report."""
        return {"type": "ceilings", "torch": torch.__version__, **asdict(self)}


def seconds(call: Callable[[int], object], calls: int, repeats: int = 5) -> float:
    """Median over `repeats` of the time of one of `calls` calls, which are given their number."""
    for number in range(max(3, calls // 2)):
        call(number)
    spent: list[float] = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        for number in range(calls):
            call(number)
        ended.record()
        torch.cuda.synchronize()
        spent.append(began.elapsed_time(ended) / 1e3 / calls)
    return median(spent)


def measure_ceilings() -> Ceilings:
    """Takes 8 GiB for a moment."""
    width = _PRODUCT_WIDTH
    copy_s = _copy_s()
    torch.cuda.empty_cache()
    a, b = (torch.randn(width, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_s = seconds(lambda _: a @ b, 10)
    return Ceilings(torch.cuda.get_device_name(), 2 * _COPY_BYTES / copy_s, 2 * width**3 / product_s)


def _copy_s() -> float:
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return seconds(lambda _: target.copy_(source), 5)
