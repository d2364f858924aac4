"""The checksum of a tensor in memory; see `model.checksum`."""

import torch

from model.checksum import checksum


def tensor_checksum(tensor: torch.Tensor, begin: int = 0) -> int:
    """CRC-32C of the bytes of a CPU tensor, in the order of its elements, going on from `begin`."""
    return checksum(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy(), begin)
