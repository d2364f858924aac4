"""Routing made from chance: popularity per layer (Zipf or Dirichlet) that drifts, and tokens that follow each other.

Real routing is skewed and local: in Mixtral 8x7B a token has the first expert of the token before it in about a
quarter of all cases (arXiv 2401.04088, table 5, layer 15), twice what chance would do. Letters: T tokens, L layers, E
experts, K of them a token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.routing_trace import MAX_EXPERTS, MAX_LAYERS, RoutingTrace
from experiments.simulation.request_traces import Requests

FloatArray = npt.NDArray[np.float64]
_CHUNK = 256
_MAX_FRAMES = 10_000
MAX_CHOICES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingModel:
    """How tokens are routed.

    `law` is `zipf` with exponent `skew` (0 is uniform) over a random order of experts, or `dirichlet` with
    concentration `skew` (small is skewed). Every `drift_s` each layer has a new popularity, and in between it goes from
    one to the next in a straight line; infinite is no drift. With probability `stickiness` a token takes over the first
    expert of the token before it.
    """

    num_layers: int = 32
    num_experts: int = 8
    top_k: int = 2
    law: str = "zipf"
    skew: float = 0.8
    drift_s: float = math.inf
    stickiness: float = 0.15

    def __post_init__(self) -> None:
        limits = {
            "num_layers": (self.num_layers, 1, MAX_LAYERS),
            "num_experts": (self.num_experts, 1, MAX_EXPERTS),
            "top_k": (self.top_k, 1, self.num_experts),
            "skew": (self.skew, 0.0, 100.0),
            "stickiness": (self.stickiness, 0.0, 1.0),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, but it must be {low} to {high}")
        if self.law not in ("zipf", "dirichlet"):
            raise ValueError(f"law is {self.law!r}, but it must be zipf or dirichlet")
        if self.law == "dirichlet" and self.skew == 0:
            raise ValueError("skew is 0, but a Dirichlet law needs one above 0")
        if not self.drift_s > 0:
            raise ValueError(f"drift_s is {self.drift_s}, but it must be above 0")

    def popularity(self, rng: np.random.Generator) -> FloatArray:
        """One draw, shape (L, E), each layer sums to 1."""
        if self.law == "dirichlet":
            drawn = rng.dirichlet(np.full(self.num_experts, self.skew), self.num_layers)
        else:
            weights = (1.0 + np.arange(self.num_experts)) ** -self.skew
            drawn = rng.permuted(np.tile(weights, (self.num_layers, 1)), axis=1)
        # No expert is quite dead, or the logarithm would be.
        drawn = np.maximum(drawn, 1e-6)
        shares: FloatArray = drawn / drawn.sum(axis=1, keepdims=True)
        return shares


def synthesize(
    model: RoutingModel, requests: Requests, rng: np.random.Generator, *, num_tokens: int, duration_s: float
) -> RoutingTrace:
    """A trace of these requests with `num_tokens` tokens of routing, evenly over `duration_s`."""
    num_choices = num_tokens * model.num_layers * model.num_experts
    if num_tokens < 1 or num_choices > MAX_CHOICES:
        raise ValueError(
            f"num_tokens is {num_tokens}; with {model.num_layers} layers of {model.num_experts} experts "
            f"it must be 1 to {MAX_CHOICES // (model.num_layers * model.num_experts)}"
        )
    if not 0 < duration_s < math.inf:
        raise ValueError(f"duration_s is {duration_s}, but it must be finite and above 0")
    times = np.linspace(0.0, duration_s, num_tokens)
    return RoutingTrace(
        num_experts=model.num_experts,
        arrival_s=requests.arrival_s,
        prompt_tokens=requests.prompt_tokens,
        output_tokens=requests.output_tokens,
        token_time_s=times,
        token_request=np.full(num_tokens, -1, np.int32),
        experts=_experts(model, rng, times),
    )


def _experts(model: RoutingModel, rng: np.random.Generator, times: FloatArray) -> npt.NDArray[Any]:
    """Experts of each token, shape (T, L, K)."""
    drifts = math.isfinite(model.drift_s)
    num_frames = int(times[-1] // model.drift_s) + 2 if drifts else 2
    if num_frames > _MAX_FRAMES:
        raise ValueError(f"drift_s is {model.drift_s}: {num_frames} popularities, but at most {_MAX_FRAMES} are drawn")
    first = model.popularity(rng)
    frames_FLE = np.stack([first, *(model.popularity(rng) if drifts else first for _ in range(num_frames - 1))])

    def popularity(times_T: FloatArray) -> FloatArray:
        at_T = times_T / model.drift_s if drifts else np.zeros(len(times_T))
        which_T = np.minimum(at_T.astype(np.int64), num_frames - 2)
        part_T = (at_T - which_T)[:, None, None]
        popularity_TLE: FloatArray = (1 - part_T) * frames_FLE[which_T] + part_T * frames_FLE[which_T + 1]
        return popularity_TLE

    return route(model, rng, times, popularity)


def route(
    model: RoutingModel, rng: np.random.Generator, times: FloatArray, popularity: Callable[[FloatArray], FloatArray]
) -> npt.NDArray[Any]:
    """Experts of a token at each of these times, shape (T, L, K), where `popularity` gives (T, L, E) for some times."""
    kind = np.uint8 if model.num_experts <= 256 else np.uint16
    chosen = np.empty((len(times), model.num_layers, model.top_k), kind)
    last_L = np.zeros(model.num_layers, np.int64)
    for start in range(0, len(times), _CHUNK):
        ids = _choose(model, rng, popularity(times[start : start + _CHUNK]), last_L)
        last_L = ids[-1, :, 0]
        chosen[start : start + len(ids)] = ids
    return chosen


def _choose(
    model: RoutingModel, rng: np.random.Generator, popularity_TLE: FloatArray, last_L: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Draws without replacement (Gumbel's trick); sticky tokens have their predecessor's first expert first."""
    score_TLE = np.log(popularity_TLE) + rng.gumbel(size=popularity_TLE.shape)
    first_TL = score_TLE.argmax(axis=2)
    sticky_TL = rng.random(first_TL.shape) < model.stickiness
    source_TL = np.where(sticky_TL, -1, np.arange(len(first_TL))[:, None])
    source_TL = np.maximum.accumulate(source_TL, axis=0)
    followed_TL = np.take_along_axis(first_TL, np.maximum(source_TL, 0), axis=0)
    first_TL = np.where(source_TL < 0, last_L, followed_TL)
    np.put_along_axis(score_TLE, first_TL[:, :, None], np.inf, axis=2)
    return np.argsort(-score_TLE, axis=2, kind="stable")[:, :, : model.top_k]
