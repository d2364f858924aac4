"""What is fuzzed: one decoder with good examples, the errors that it may raise, and the bounds that it must keep."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

KIB = 1 << 10
MIB = 1 << 20

Decode = Callable[[bytes], object]


@dataclass(frozen=True, kw_only=True)
class Target:
    """`decode` takes whatever bytes there are; it must return, or raise one of `errors`, within `max_s` seconds.

    It may allocate `base_bytes` and `per_byte` bytes for each byte of its input. `seeds` are inputs that it accepts.
    `repair` makes checksums of a damaged input right again, so that what lies behind them is reached; `words` are
    pieces that inputs are made of. `is_json`: inputs are changed value by value too. `share` is its part of a
    campaign's executions, `quick` how many the test suite makes.
    """

    name: str
    decode: Decode
    errors: tuple[type[BaseException], ...]
    seeds: tuple[bytes, ...]
    repair: Callable[[bytes], bytes] | None = None
    words: tuple[bytes, ...] = ()
    is_json: bool = False
    base_bytes: int = 2 * MIB
    per_byte: int = 64
    max_s: float = 5.0
    share: float = 1.0
    quick: int = 1000

    def max_bytes(self, size: int) -> int:
        """What decoding an input of `size` bytes may allocate, in bytes."""
        return self.base_bytes + self.per_byte * size


Make = Callable[[Path], Target]
"""Makes a target that may keep files in a directory of its own."""
