"""A policy on the load that is to come: forecasts each (layer, expert) from the recent windows and asks another policy.

The forecast is Holt's double exponential smoothing (a level and a trend). What to do about it is the inner policy's.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cluster.layout import FloatArray
from cluster.policy import Action, Observation, Policy


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """Level and trend per second of every (layer, expert), as of `at_s`."""

    level_LE: FloatArray
    trend_LE: FloatArray
    at_s: float

    def seen(self, work_LE: FloatArray, now_s: float, half_life_s: float) -> "Forecast":
        """After one more window. What was known weighs half after `half_life_s`, in the level and in the trend."""
        gap_s = now_s - self.at_s
        if gap_s <= 0:
            return self
        new = 1 - 0.5 ** (gap_s / half_life_s)
        level_LE = new * work_LE + (1 - new) * (self.level_LE + gap_s * self.trend_LE)
        trend_LE = new * (level_LE - self.level_LE) / gap_s + (1 - new) * self.trend_LE
        return Forecast(np.maximum(level_LE, 0.0), trend_LE, now_s)

    def ahead(self, horizon_s: float) -> FloatArray:
        """Expected work in `horizon_s`; never below 0 nor above twice the level, since no trend lasts."""
        expected: FloatArray = np.clip(self.level_LE + horizon_s * self.trend_LE, 0.0, 2 * self.level_LE)
        return expected


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictive:
    """The policy: `inner` on the work expected in `horizon_s`, about the time that a move takes to help."""

    inner: Policy
    horizon_s: float = 30.0
    half_life_s: float = 30.0

    def __post_init__(self) -> None:
        if not (self.horizon_s >= 0 and self.half_life_s > 0):
            raise ValueError(
                f"horizon_s is {self.horizon_s} and half_life_s {self.half_life_s}; they must be at least and above 0"
            )

    def __call__(
        self, seen: Observation, state: tuple[Forecast, Any] | None
    ) -> tuple[tuple[Action, ...], tuple[Forecast, Any]]:
        """One round. The state is the forecast and the inner policy's state."""
        forecast, inner_state = state or (Forecast(seen.work_LE, np.zeros_like(seen.work_LE), seen.now_s), None)
        forecast = forecast.seen(seen.work_LE, seen.now_s, self.half_life_s)
        work_LE = forecast.ahead(self.horizon_s)
        parts = {
            name: np.minimum(part, work_LE)
            for name in ("growing_LE", "divisible_LE")
            if (part := getattr(seen, name)) is not None
        }
        actions, inner_state = self.inner(replace(seen, work_LE=work_LE, **parts), inner_state)
        return actions, (forecast, inner_state)
