"""The checksum of weights: CRC-32C (Castagnoli), by the processor's own instruction where it has one.

It finds every flipped bit and is no defence against somebody who forges weights on purpose: for that, compare the
files with their publisher's hashes. What is covered is the caller's to say.
"""

import numpy as np
import numpy.typing as npt
from google_crc32c import extend


def checksum(data: bytes | npt.NDArray[np.uint8], begin: int = 0) -> int:
    """CRC-32C of `data`, going on from `begin`: that of what came before."""
    found: int = extend(begin, data)
    return found
