"""How arrays of expert ids are kept, wherever they go."""

from typing import Any

import numpy as np
import numpy.typing as npt

ExpertIds = npt.NDArray[Any]
"""uint8, or little-endian uint16 where a layer has more than 256 experts."""


def id_dtype(num_experts: int) -> np.dtype[Any]:
    """The element type of `ExpertIds`."""
    return np.dtype(np.uint8) if num_experts <= 256 else np.dtype("<u2")
