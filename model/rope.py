"""Rotary position embeddings (arXiv 2104.09864) in Hugging Face's half-rotation layout, and their scaling.

The rows of wq and wk are expected in that layout; reordering others is the checkpoint's work.

Tensor suffixes: T tokens, H heads, d head_dim, h = head_dim / 2.
"""

import math

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling
from model.device_calls import upload

_TABLE_CHUNK = 1024
_TOKENS_AT_ONCE = 64  # so that what one operation writes is still in the cache for the next


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angles per position (h, fp32), and the factor on cosine and sine (1 except for yarn)."""
    dim, scaling = config.head_dim, config.rope_scaling
    if scaling is None:
        return 1.0 / _periods(config.rope_theta, dim), 1.0
    if scaling.kind == "linear":
        return 1.0 / _periods(config.rope_theta, dim) / scaling.factor, 1.0
    if scaling.kind == "dynamic":
        return 1.0 / _periods(_dynamic_theta(config, scaling), dim), 1.0
    if scaling.kind == "llama3":
        return _llama3(1.0 / _periods(config.rope_theta, dim), scaling), 1.0
    return _yarn(config.rope_theta, dim, scaling)


def _periods(theta: float, dim: int) -> Tensor:
    """theta ** (2i / d): positions per radian."""
    periods: Tensor = theta ** (torch.arange(0, dim, 2).float() / dim)
    return periods


def _dynamic_theta(config: ModelConfig, scaling: RopeScaling) -> float:
    """NTK-aware base for the longest context that may be served.

    The original rule follows the current length, so that a token's numbers would depend on how the sequence
    was cut into steps. Here the length is fixed: plain RoPE while `max_context` is the trained context.
    """
    if config.head_dim <= 2:
        return config.rope_theta
    stretch = scaling.factor * max(config.max_context, scaling.original_max_context)
    stretch = stretch / scaling.original_max_context - (scaling.factor - 1)
    return float(config.rope_theta * stretch ** (config.head_dim / (config.head_dim - 2)))


def _llama3(inv_freq_h: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    context, low, high = scaling.original_max_context, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength_h = 2 * math.pi / inv_freq_h
    smooth_h = (context / wavelength_h - low) / (high - low)
    medium_h = (1 - smooth_h) * inv_freq_h / scaling.factor + smooth_h * inv_freq_h
    scaled_h = torch.where(wavelength_h > context / low, inv_freq_h / scaling.factor, inv_freq_h)
    is_medium_h = (wavelength_h >= context / high) & (wavelength_h <= context / low)
    return torch.where(is_medium_h, medium_h, scaled_h)


def _yarn(theta: float, dim: int, scaling: RopeScaling) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071, section 3.2): interpolate slow dimensions, keep fast ones, ramp between."""

    def dimension_of(rotations: float) -> float:
        return dim * math.log(scaling.original_max_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), dim - 1)
    span = high - low if high != low else 0.001
    keep_h = 1 - ((torch.arange(dim // 2).float() - low) / span).clamp(0, 1)
    periods_h = _periods(theta, dim)
    inv_freq_h = (1.0 / (scaling.factor * periods_h)) * (1 - keep_h) + (1.0 / periods_h) * keep_h
    if scaling.attention_factor is not None:
        return inv_freq_h, scaling.attention_factor
    return inv_freq_h, 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


class RotaryTable:
    """Cosines and sines of every position met so far, grown in fixed chunks.

    Angles are fp32, as in transformers; their cosine and sine are taken in fp64 and rounded once, so that
    they do not depend on a library's approximation nor on which positions are asked for together.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str) -> None:
        self._inv_freq_h, self._factor = inverse_frequencies(config)
        self._max_context = config.max_context
        self._device = device
        self._cos = torch.empty(0, config.head_dim, device=device)
        self._sin = torch.empty(0, config.head_dim, device=device)

    def rows(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `apply_rope`, both (T, 1, d). ValueError past the model's context."""
        last = int(positions_T.max())
        if last >= self._max_context:
            raise ValueError(f"position {last} is past the model's context of {self._max_context}")
        while last >= len(self._cos):
            self._grow()
        positions_T = upload(positions_T, self._device)
        return self._cos[positions_T].unsqueeze(1), self._sin[positions_T].unsqueeze(1)

    def _grow(self) -> None:
        start = len(self._cos)
        positions = torch.arange(start, start + _TABLE_CHUNK).float()
        angles = (positions[:, None] * self._inv_freq_h).double()
        cos, sin = angles.cos().float() * self._factor, angles.sin().float() * self._factor
        self._cos = torch.cat((self._cos, torch.cat((cos, cos), dim=1).to(self._device)))
        self._sin = torch.cat((self._sin, torch.cat((-sin, sin), dim=1).to(self._device)))


def apply_rope_(x_THd: Tensor, cos_T1d: Tensor, sin_T1d: Tensor) -> Tensor:
    """Rotate queries or keys in place: halves (a, b) of a head become (a cos - b sin, b cos + a sin)."""
    if len(x_THd) <= _TOKENS_AT_ONCE or x_THd.is_cuda:
        return _rotate_(x_THd, cos_T1d, sin_T1d)
    for start in range(0, len(x_THd), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        _rotate_(x_THd[part], cos_T1d[part], sin_T1d[part])
    return x_THd


def _rotate_(x_THd: Tensor, cos_T1d: Tensor, sin_T1d: Tensor) -> Tensor:
    swapped_THd = x_THd.roll(x_THd.shape[-1] // 2, -1)
    return x_THd.mul_(cos_T1d).add_(swapped_THd.mul_(sin_T1d))
