"""A source of random weights that are made where they are wanted: nothing is read, and nothing is kept.

Reading Mixtral 8x7B from disk takes minutes; only shapes and speed matter here.
"""

import math
import zlib
from dataclasses import dataclass, replace

import torch

from experiments.engine_bench.synthetic import DEVIATION, MIXTRAL
from model.config import ModelConfig
from model.storage.tensor_names import tensor_specs


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """A `WeightSource`: a tensor's name decides its numbers, on each kind of device others."""

    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def of(
        cls, *, hidden: int = MIXTRAL.hidden_size, ffn: int = MIXTRAL.ffn_size, layers: int = MIXTRAL.num_layers
    ) -> "RandomWeights":
        """Mixtral 8x7B, with other widths or fewer layers; its deviation keeps numbers of the size they have there."""
        config = replace(MIXTRAL, hidden_size=hidden, ffn_size=ffn, num_layers=layers)
        return cls(config, {spec.name: spec.shape for spec in tensor_specs(config)})

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor that `read` returns."""
        return self.shapes[name]

    def read(self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> torch.Tensor:
        """Ones for a norm, else normally distributed numbers."""
        wanted = dtype or self.dtype
        if name.endswith("norm"):
            return torch.ones(self.shapes[name], dtype=wanted, device=device)
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        return torch.empty(self.shapes[name], dtype=wanted, device=device).normal_(0, DEVIATION, generator=generator)

    @property
    def expert_bytes(self) -> int:
        """One expert in one layer, in bf16."""
        return 2 * 3 * self.config.hidden_size * self.config.ffn_size

    @property
    def backbone_bytes(self) -> int:
        """What every step reads beside the experts, in bf16: all but the embedding table."""
        names = [name for name in self.shapes if ".experts." not in name and name != "embed"]
        return 2 * sum(math.prod(self.shapes[name]) for name in names)
