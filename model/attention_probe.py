"""Finds, at start and by experiment, how torch's fused attention may be called so that a query keeps its bits.

Three things change from call to call: query tokens per sequence, keys (those past a query's own are masked) and
sequences. Which calls a step makes of the allowed numbers is `model.attention_plan`'s work.

Tensor suffixes: n sequences, Q query tokens of a sequence, G kv heads, h query heads per kv head, S keys, d
head_dim, X = h times d, M rows of one call.
"""

import torch
from torch import Tensor

from model.attention_plan import (
    CHUNK_BYTES,
    CUDA_CHUNK_BYTES,
    CUDA_WASTE_BYTES,
    KEY_SPAN,
    WASTE_BYTES,
    AttentionShape,
)
from model.config import ModelConfig
from model.fused_attention import Attend, fused_attention
from model.kernels import KernelError
from model.numerics import RowClass, calibrate_rows, same_bits

_TOKENS = (1, 2, 4, 8, 16, 32, 64)
_LARGEST_ROWS = 128
_CUDA_TOKENS = (*_TOKENS, 128, 256)
_CUDA_LARGEST_ROWS = 1024
_KEYS = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448)
_SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16)
_CUDA_SEQUENCES = (*_SEQUENCES, 24, 32, 48, 64, 96, 128)
_BATCH_KEYS = 64
_POOL = 2


@torch.no_grad()
def calibrate_attention(config: ModelConfig, device: torch.device, attend: Attend | None = None) -> AttentionShape:
    """The numbers of query tokens, keys and sequences that agree bit for bit on this machine and thread count.

    Raises KernelError where keys that are masked change a result however they are cut.
    """
    probe = _Probe(config, device, attend or fused_attention(device))
    on_gpu = device.type == "cuda"
    if not probe.spans_agree():
        raise KernelError("fused attention rounds by what is masked on this machine, so exact numbers cannot be kept")
    token_class = probe.token_class()
    key_class = probe.key_class(token_class)
    return AttentionShape(
        head_dim=config.head_dim,
        num_kv_heads=config.num_kv_heads,
        heads_per_kv=config.num_heads // config.num_kv_heads,
        window=config.sliding_window,
        token_class=token_class,
        key_class=key_class,
        batch_class=probe.batch_class(token_class, key_class.bucket(_BATCH_KEYS)),
        chunk_bytes=CUDA_CHUNK_BYTES if on_gpu else CHUNK_BYTES,
        waste_bytes=CUDA_WASTE_BYTES if on_gpu else WASTE_BYTES,
    )


class _Probe:
    """Random queries, keys and values of a model's shape; every kv head gets the same queries."""

    def __init__(self, config: ModelConfig, device: torch.device, attend: Attend) -> None:
        self._attend = attend
        self._heads = config.num_heads // config.num_kv_heads
        on_gpu = device.type == "cuda"
        tokens = _CUDA_TOKENS if on_gpu else _TOKENS
        most_tokens = max(1, (_CUDA_LARGEST_ROWS if on_gpu else _LARGEST_ROWS) // self._heads)
        self._tokens = [count for count in tokens if count <= most_tokens]
        self._sequences = _CUDA_SEQUENCES if on_gpu else _SEQUENCES
        self._chunk_bytes = CUDA_CHUNK_BYTES if on_gpu else CHUNK_BYTES
        generator = torch.Generator().manual_seed(2)
        self._width = config.head_dim
        self._device = device
        shape = (2, config.num_kv_heads, 2 * KEY_SPAN, config.head_dim)
        self._kv = torch.randn(shape, generator=generator).to(device)
        self._pool_QX = torch.randn(_POOL, self._heads * self._width, generator=generator).to(device)
        self._key_bytes = self._kv[:, :, 0].nbytes

    def token_class(self) -> RowClass:
        """Query tokens per sequence, over one span and over two."""

        def answers(x_QX: Tensor) -> Tensor:
            one, two = self._answers(x_QX[None], KEY_SPAN), self._answers(x_QX[None], 2 * KEY_SPAN, KEY_SPAN + 90)
            return torch.cat((one, two), dim=-1)[0]

        return calibrate_rows(answers, self._pool_QX.shape[1], self._tokens, pool_rows=_POOL, device=self._device)

    def key_class(self, token_class: RowClass) -> RowClass:
        """Numbers of keys that answer as a whole span does of which the rest is masked."""
        agreeing = [keys for keys in _KEYS if all(self._keys_agree(keys, tokens) for tokens in token_class.buckets)]
        return RowClass((*agreeing, KEY_SPAN))

    def batch_class(self, token_class: RowClass, keys: int) -> RowClass:
        """Numbers of sequences that may share a call, whatever their query tokens; 1 always may."""
        most = max(1, self._chunk_bytes // (keys * self._key_bytes))
        sizes = [size for size in self._sequences if size <= most]
        for tokens in token_class.buckets:
            width = tokens * self._pool_QX.shape[1]

            def answers(x_nM: Tensor, tokens: int = tokens) -> Tensor:
                return self._answers(x_nM.view(len(x_nM), tokens, -1), keys).flatten(1)

            found = calibrate_rows(answers, width, sizes, anchor=1, pool_rows=_POOL, device=self._device)
            sizes = list(found.buckets)
        return RowClass(tuple(sizes))

    def spans_agree(self) -> bool:
        """Whether a span of which nothing is seen changes no bit, be it behind the keys or before them."""
        x_nQX = self._pool_QX[None]
        for seen in (1, 200, KEY_SPAN):
            if not same_bits(self._answers(x_nQX, 2 * KEY_SPAN, seen), self._answers(x_nQX, KEY_SPAN, seen)):
                return False
        late = self._answers(x_nQX, KEY_SPAN, KEY_SPAN - 70, skipped=KEY_SPAN)
        return same_bits(self._answers(x_nQX, 2 * KEY_SPAN, 2 * KEY_SPAN - 70, hidden=KEY_SPAN), late)

    def _keys_agree(self, keys: int, tokens: int) -> bool:
        x_nQX = self._pool_QX[torch.arange(tokens) % _POOL][None]
        for seen in (keys, keys - 13, keys // 2 + 1):
            if not same_bits(self._answers(x_nQX, keys, seen), self._answers(x_nQX, KEY_SPAN, seen)):
                return False
        part = self._answers(x_nQX, KEY_SPAN + keys, KEY_SPAN + keys - 1)
        return same_bits(part, self._answers(x_nQX, 2 * KEY_SPAN, KEY_SPAN + keys - 1))

    def _answers(
        self, x_nQX: Tensor, keys: int, seen: int | None = None, *, skipped: int = 0, hidden: int = 0
    ) -> Tensor:
        """(n, Q, G*h*d) over `keys` keys behind the `skipped` first, of which those before `hidden` and from `seen`
        on are masked."""
        sequences, tokens, _ = x_nQX.shape
        kv = self._kv[:, None, :, skipped : skipped + keys].expand(2, sequences, -1, -1, -1).contiguous()
        q_nGRd = x_nQX.view(sequences, 1, -1, self._width).expand(-1, kv.shape[2], -1, -1).contiguous()
        mask = torch.zeros(1, 1, 1, keys, device=self._device)
        mask[..., :hidden] = -torch.inf
        mask[..., keys if seen is None else seen :] = -torch.inf
        answers_nGRd = self._attend(q_nGRd, kv[0], kv[1], attn_mask=mask, scale=self._width**-0.5)
        answers_nGQhd = answers_nGRd.view(sequences, -1, tokens, self._heads, self._width)
        return answers_nGQhd.transpose(1, 2).flatten(2)
