"""How many GPUs there are, with and without asking torch."""

import torch

from actors.gpus import num_gpus


def test_there_are_as_many_gpus_as_torch_finds() -> None:
    assert num_gpus() == torch.cuda.device_count()
