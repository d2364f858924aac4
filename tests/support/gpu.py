"""What tests on a real GPU share: the mark that skips them elsewhere, and weights made on the device."""

import pytest
import torch

from experiments.gpu_bench.random_weights import RandomWeights
from model.experts import ExpertColumn
from model.kernels import KERNELS

CUDA = torch.device("cuda")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")


def needs_kernel(name: str) -> None:
    """Skips where this GPU cannot run the kernel."""
    if not KERNELS[name].usable(CUDA):
        pytest.skip(f"this GPU has no {name} arithmetic")


def random_column(kernel: str, *, hidden: int = 1024, ffn: int = 3584, layers: int = 1) -> ExpertColumn:
    """Expert 0 of a model with these widths."""
    weights = RandomWeights.of(hidden=hidden, ffn=ffn, layers=layers)
    return ExpertColumn.load(weights, 0, range(layers), kernel, CUDA)


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random rows on the device."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(CUDA)
