"""When requests are sent: arrival times as a pure function of rate, burstiness and a source of chance."""

import math

import numpy as np


def arrival_times_s(rng: np.random.Generator, num: int, rate: float, burstiness: float) -> list[float]:
    """Seconds after the start at which each of `num` requests arrives, ascending.

    As in vLLM's `bench serve`: gaps are gamma distributed with shape `burstiness` and mean 1/`rate` (1 is a Poisson
    process, below it burstier, infinity evenly spaced), scaled so that the last request comes at `num`/`rate`.
    An infinite rate sends all at 0.
    """
    if math.isinf(rate):
        return [0.0] * num
    if math.isinf(burstiness):
        gaps = np.full(num, 1.0 / rate)
    else:
        gaps = rng.gamma(shape=burstiness, scale=1.0 / (rate * burstiness), size=num)
    times = np.cumsum(gaps)
    if times[-1] > 0:
        times *= num / rate / times[-1]
    return [float(time) for time in times]
