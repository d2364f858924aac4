"""Runs text through a dense model layer by layer and shows what every FFN is given.

All tokens pass one layer before the next is read, so memory holds one layer's weights however large the model
is. That is the opposite order of serving (`model.transformer`: all layers for a few tokens), and needs no KV
cache and no exact agreement between batches; so this is plain batched torch. A test compares the two.

Legend: W windows, S tokens per window, T = W*S tokens, D model dim, H heads, G kv heads, d head dim.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from model.config import ModelConfig
from model.rope import RotaryTable, apply_rope_
from model.storage.weight_source import WeightSource

WINDOWS_AT_ONCE = 8


@torch.no_grad()
def ffn_inputs(source: WeightSource, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """For each layer of a dense model in turn, the FFN's inputs (W, S, D) in fp32.

    `windows` are sequences of equal length, each beginning at position 0.
    """
    config = source.config
    ids_WS = torch.tensor(windows)
    h_WSD = source.read("embed", torch.float32)[ids_WS]
    rope = _rope(config, ids_WS.shape[1])
    for layer in range(config.num_layers):
        weights = _LayerWeights(source, layer)
        for part in _parts(len(h_WSD)):
            h_WSD[part] += _attention(h_WSD[part], weights, config, *rope)
        x_WSD = rms_norm(h_WSD, h_WSD.shape[-1:], weights["ffn_norm"], config.norm_eps)
        yield x_WSD
        if layer < config.num_layers - 1:
            _add_ffn(h_WSD, x_WSD, weights)


class _LayerWeights:
    """One layer's tensors in fp32, each read when it is asked for."""

    def __init__(self, source: WeightSource, layer: int) -> None:
        self._source = source
        self._layer = layer
        self._read: dict[str, Tensor] = {}

    def __getitem__(self, part: str) -> Tensor:
        if part not in self._read:
            self._read[part] = self._source.read(f"layers.{self._layer}.{part}", torch.float32)
        return self._read[part]


def _rope(config: ModelConfig, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, 1, d)."""
    return RotaryTable(config, "cpu").rows(torch.arange(num_positions))


def _attention(h_WSD: Tensor, weights: _LayerWeights, config: ModelConfig, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
    """Causal grouped-query attention of whole windows, through the output projection (W, S, D)."""
    W, S, D = h_WSD.shape
    d = config.head_dim
    x_WSD = rms_norm(h_WSD, (D,), weights["attn_norm"], config.norm_eps)
    q_WSHd = (x_WSD @ weights["wq"].T).view(W, S, config.num_heads, d)
    k_WSGd = (x_WSD @ weights["wk"].T).view(W, S, config.num_kv_heads, d)
    v_WSGd = (x_WSD @ weights["wv"].T).view(W, S, config.num_kv_heads, d)
    out_WHSd = scaled_dot_product_attention(
        apply_rope_(q_WSHd, cos_S1d, sin_S1d).transpose(1, 2),
        apply_rope_(k_WSGd, cos_S1d, sin_S1d).transpose(1, 2),
        v_WSGd.transpose(1, 2),
        attn_mask=_visible(S, config.sliding_window),
        enable_gqa=True,
    )
    return out_WHSd.transpose(1, 2).reshape(W, S, -1) @ weights["wo"].T


def _visible(num_tokens: int, window: int | None) -> Tensor:
    """Which keys (columns) each query sees: itself and those before it, at most `window` in all."""
    visible_SS = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    return visible_SS if window is None else visible_SS.triu(1 - window)


def _add_ffn(h_WSD: Tensor, x_WSD: Tensor, weights: _LayerWeights) -> None:
    """Add the dense FFN of x to h, in place."""
    w1, w2, w3 = (weights[f"experts.0.{part}"] for part in ("w1", "w2", "w3"))
    for part in _parts(len(h_WSD)):
        x = x_WSD[part]
        h_WSD[part] += (silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def _parts(num_windows: int) -> list[slice]:
    """Slices of a few windows each: what is between two products should not need memory for all."""
    return [slice(start, start + WINDOWS_AT_ONCE) for start in range(0, num_windows, WINDOWS_AT_ONCE)]
