"""How many GPUs this machine has for torch, found without torch where there are none."""

from pathlib import Path

_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""What a GPU's driver shows: NVIDIA's, that of a Linux under Windows, AMD's. Without any, torch finds no GPU either."""


def num_gpus() -> int:
    """As `torch.cuda.device_count` says, who is only asked where there may be one: importing torch takes seconds."""
    if not any(Path(device).exists() for device in _DEVICES):
        return 0
    import torch

    return torch.cuda.device_count()
