"""Paged storage for keys and values: fixed blocks, shared by all sequences.

Which block belongs to whom is decided elsewhere (the block allocator); reading is `model.attention`'s work.

Tensor suffixes: T tokens, G kv heads, d head_dim.
"""

import torch
from torch import Tensor

from model.config import ModelConfig


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block of `block_size` positions over all layers, keys and values."""
    return 2 * config.num_layers * config.num_kv_heads * block_size * config.head_dim * dtype.itemsize


def default_kv_dtype(device: torch.device | str) -> torch.dtype:
    """fp32 on CPU (exact, and no conversion on the way), bf16 on CUDA."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


class KVCache:
    """Keys and values of all layers, `num_blocks` blocks of `block_size` positions.

    A slot is `block_id * block_size + offset`. Memory is not cleared as a whole, so that the operating system
    gives pages only as blocks come into use: who writes a block's first position clears what is not written yet.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"need at least one block and one position, got {num_blocks} x {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self._num_kv_heads = config.num_kv_heads
        shape = (num_blocks, block_size, 2 * config.num_kv_heads, config.head_dim)
        self._layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes reserved for all layers."""
        return sum(layer.nbytes for layer in self._layers)

    def kv(self, layer: int) -> Tensor:
        """A layer's keys and values (num_blocks, block_size, 2G, head_dim): a block is one stretch of memory."""
        return self._layers[layer]

    def k(self, layer: int) -> Tensor:
        """Keys of a layer, a view shaped (num_blocks, block_size, G, head_dim)."""
        return self._layers[layer][:, :, : self._num_kv_heads]

    def v(self, layer: int) -> Tensor:
        """Values of a layer, a view shaped (num_blocks, block_size, G, head_dim)."""
        return self._layers[layer][:, :, self._num_kv_heads :]

    def write(self, layer: int, slots_T: Tensor, kv_TGd: Tensor, cleared: Tensor | None = None) -> None:
        """`write_kv` to a layer."""
        write_kv(self._layers[layer], slots_T, kv_TGd, cleared)


def write_kv(kv: Tensor, slots_T: Tensor, kv_TGd: Tensor, cleared: Tensor | None = None) -> None:
    """Store one position per token in a layer's `KVCache.kv`; zero the slots `cleared`.

    Keys and values of a token are stacked along the head axis (2G).
    """
    flat = kv.view(-1, *kv.shape[2:])
    if cleared is not None:
        flat.index_fill_(0, cleared, 0.0)
    flat.index_copy_(0, slots_T, kv_TGd.to(kv.dtype))
