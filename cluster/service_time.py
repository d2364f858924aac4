"""How long a host takes for a batch: seconds ≈ a · calls + b · tokens, fitted online from what was measured.

A call is one expert's rows of one batch: its weights are read once. Least squares over exponentially forgotten
measurements, kept as five sums; both coefficients stay non-negative. Which host serves a batch is decided by others,
with these coefficients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class ServiceTime:
    """One call of `tokens` tokens takes a_s + b_s · tokens seconds."""

    a_s: float
    b_s: float

    def __post_init__(self) -> None:
        for name in ("a_s", "b_s"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}, but it must be finite and at least 0")

    def seconds(self, tokens: float) -> float:
        """Of one call."""
        return self.a_s + self.b_s * tokens

    @property
    def ridge_tokens(self) -> float:
        """Tokens at which the part that grows equals the part that is always paid; infinite where none grows."""
        return self.a_s / self.b_s if self.b_s > 0 else math.inf


_UNCLIPPED = 4  # measurements that are taken as they are: there is nothing yet to hold them to


class AffineFit:
    """The fit of one replica or host. A measurement costs a few additions; there is nothing to grow.

    `prior` is the line until the first measurement. From then on it speaks of its shape only, not of its level: that a
    machine which reads weights k times slower also computes k times slower weighs as much as `prior_weight`
    measurements at `prior_tokens` tokens that are never forgotten. So calls of one size fit the level and take their
    slope from the prior, and calls of different sizes soon outvote it. Errors count relative to the prior's time, or
    the noise of large calls would drown what small ones say.
    After n measurements an earlier one weighs `forgetting`^n: 0.99 remembers about 100. One measurement above `clip`
    times what was expected counts as that much: a hiccup bends the line a little, a host that stays slow does so by
    and by.
    """

    __slots__ = ("_clip", "_forgetting", "_kk", "_kt", "_ky", "_num", "_prior", "_shape", "_tt", "_ty", "a_s", "b_s")

    def __init__(
        self,
        prior: ServiceTime,
        *,
        forgetting: float = 0.99,
        prior_weight: float = 0.1,
        prior_tokens: float = 64.0,
        clip: float = 4.0,
    ) -> None:
        if not 0 < forgetting <= 1:
            raise ValueError(f"forgetting is {forgetting}, but it must be above 0 and at most 1")
        if not (prior_weight > 0 and prior_tokens > 0 and clip > 1):
            raise ValueError(
                f"prior_weight is {prior_weight}, prior_tokens {prior_tokens} and clip {clip}, "
                "but they must be above 0, 0 and 1"
            )
        far_s = prior.seconds(prior_tokens)
        if not far_s > 0:
            raise ValueError(f"prior is {prior}: calls that take no time have no shape")
        self.a_s, self.b_s = prior.a_s, prior.b_s
        self._forgetting, self._clip = forgetting, clip
        self._num = 0
        self._prior = (prior.a_s, prior.b_s)
        # What stands for the shape: a measurement of no seconds, of k calls and t tokens that cancel on the prior.
        k, t = prior.b_s * prior_tokens / far_s**2, -prior.a_s * prior_tokens / far_s**2
        self._shape = (prior_weight * k * k, prior_weight * k * t, prior_weight * t * t)
        # Σ k², Σ k·t, Σ t², Σ k·y and Σ t·y of calls k, tokens t and seconds y, each as a multiple of the prior's time.
        self._kk = self._kt = self._tt = self._ky = self._ty = 0.0

    def observe(self, tokens: int, seconds: float, calls: int = 1) -> None:
        """`calls` calls, with `tokens` tokens in all, were measured together.

        Raises ValueError for what cannot be: no calls, fewer tokens than calls, negative or no finite time.
        """
        if not (1 <= calls <= tokens and 0 <= seconds < math.inf):
            raise ValueError(
                f"{'a call' if calls == 1 else f'{calls} calls'} of {tokens} tokens took {seconds} s: "
                "calls are at least 1, tokens at least as many, seconds at least 0"
            )
        if self._num >= _UNCLIPPED:
            most_s = self._clip * (self.a_s * calls + self.b_s * tokens)
            if 0 < most_s < seconds:
                seconds = most_s
        else:
            self._num += 1
        prior_a_s, prior_b_s = self._prior
        prior_s = prior_a_s * calls + prior_b_s * tokens
        k, t, y = calls / prior_s, tokens / prior_s, seconds / prior_s
        keep = self._forgetting
        kk = self._kk = keep * self._kk + k * k
        kt = self._kt = keep * self._kt + k * t
        tt = self._tt = keep * self._tt + t * t
        ky = self._ky = keep * self._ky + k * y
        ty = self._ty = keep * self._ty + t * y
        shape_kk, shape_kt, shape_tt = self._shape
        kk, kt, tt = kk + shape_kk, kt + shape_kt, tt + shape_tt
        # Above 0: no measurement is in proportion to the shape's, whose calls and tokens have different signs.
        spread = kk * tt - kt * kt
        level, slope = ky * tt - ty * kt, kk * ty - kt * ky
        if level <= 0:
            self.a_s, self.b_s = 0.0, self._ty / self._tt
        elif slope <= 0:
            self.a_s, self.b_s = self._ky / self._kk, 0.0
        else:
            self.a_s, self.b_s = level / spread, slope / spread

    def forget(self, share: float) -> None:
        """What was measured counts only `share` of what it did: it was long ago. The line stays until the next one."""
        self._kk, self._kt, self._tt = share * self._kk, share * self._kt, share * self._tt
        self._ky, self._ty = share * self._ky, share * self._ty
        self._num = 0

    @property
    def service_time(self) -> ServiceTime:
        """The line as of the last measurement."""
        return ServiceTime(self.a_s, self.b_s)


def busy_seconds(calls_LE: npt.ArrayLike, tokens_LE: npt.ArrayLike, cost: ServiceTime) -> npt.NDArray[np.float64]:
    """Seconds of one host that a window's calls and tokens per (layer, expert) cost, shape (L, E)."""
    calls, tokens = np.asarray(calls_LE, np.float64), np.asarray(tokens_LE, np.float64)
    if calls.shape != tokens.shape or calls.ndim != 2:
        raise ValueError(
            f"calls_LE has shape {calls.shape} and tokens_LE {tokens.shape}; both must be layers by experts"
        )
    seconds: npt.NDArray[np.float64] = calls * cost.a_s + tokens * cost.b_s
    return seconds


def quantiles(
    values: Sequence[float] | npt.NDArray[np.float64], points: Sequence[float] = (0.0, 0.5, 1.0)
) -> dict[float, float]:
    """Quantiles of a per-layer figure such as `load.balancedness`, so that a metric has few labels however many layers.

    `quantiles(balancedness(load_LE))` is {0.0: the worst layer, 0.5: the median, 1.0: the best}.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"values have shape {numbers.shape}; they must be some finite numbers in a row")
    return {point: float(at) for point, at in zip(points, np.quantile(numbers, points), strict=True)}
