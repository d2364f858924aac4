"""What the loaders ask of a place that holds weights; a `Checkpoint` is one, a GGUF file another.

Which file a tensor lives in, and how it is stored there, is the source's own business.
"""

from typing import Protocol

import torch

from model.config import ModelConfig


class TensorReader(Protocol):
    """Tensors by canonical name, read by whoever knows which there are."""

    def read(self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> torch.Tensor:
        """Read one tensor; wq and wk come in Hugging Face (half-rotation) row order."""
        ...


class WeightSource(TensorReader, Protocol):
    """A model's configuration and its tensors by canonical name (`layers.0.wq`, `layers.0.experts.0.w1`)."""

    @property
    def config(self) -> ModelConfig:
        """The model these tensors make up."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the linear weights, unless `read` is asked for another."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor that `read` returns."""
        ...
