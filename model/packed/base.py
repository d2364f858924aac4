"""What a kernel is: how one weight matrix is held in memory and multiplied. The kernels themselves have a file each.

Every kernel takes fp32 rows and returns fp32 rows. Which row counts may be used together is found by
`model.numerics`; which tensors are packed, and when, is left to the layers that own them.

Tensor suffixes: M rows of one call, I and O input and output width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class KernelError(RuntimeError):
    """A kernel that cannot be used here, or that computes wrong numbers on this machine."""


class PackedLinear(Protocol):
    """A weight matrix in a kernel's own layout. Calling it maps fp32 x_MI to fp32 x_MO."""

    @property
    def kernel(self) -> str:
        """The kernel in use, which differs from the one asked for when the weight did not fit it."""

    @property
    def weight_bytes(self) -> int:
        """Bytes held by the packed weight."""

    @property
    def out_features(self) -> int:
        """O."""

    @property
    def in_features(self) -> int:
        """I."""

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The weights as they lie in memory, where a product would round a flipped bit away (see `model.canary`).

        May be a copy made for the occasion. Empty where every bit shows in the products of whole numbers.
        """

    def __call__(self, x_MI: Tensor) -> Tensor:
        """x_MO = x_MI times the transposed weight. The result is the caller's to overwrite."""


def _everywhere(_device: torch.device) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Kernel:
    """One entry of the registry. `tolerance` bounds the self-test's error relative to the largest output.

    `pack_parts` takes the parts of one weight, to be held one above the other, and reads the next one when it
    has done with the last: packing must not need a second fp32 tensor beside the part in hand and what is
    packed. It may overwrite the parts. `runs_on` says whether this machine can. `fuses` says that one product
    for two weights with the same input is faster than two. `arithmetic` names what decides the bits, where
    that is more than the kernel's name. `test_shape` is the (O, I) of the self-test.
    """

    name: str
    device_types: tuple[str, ...]
    tolerance: float
    pack_parts: Callable[[Iterable[Tensor]], PackedLinear]
    fuses: bool = False
    runs_on: Callable[[torch.device], bool] = _everywhere
    arithmetic: Callable[[], str] | None = None
    test_shape: tuple[int, int] = (83, 71)

    def pack(self, weight_OI: Tensor) -> PackedLinear:
        """A weight of one part, which may be overwritten."""
        return self.pack_parts([weight_OI])

    def usable(self, device: torch.device) -> bool:
        """Whether the kernel can be used on `device` of this machine."""
        return device.type in self.device_types and self.runs_on(device)


def joined(parts: Iterable[Tensor]) -> Tensor:
    """The parts one above the other; a single part is returned as it is."""
    read = list(parts)
    return read[0] if len(read) == 1 else torch.cat(read)
