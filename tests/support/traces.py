"""Small routing traces for tests, made from plain numbers."""

from collections.abc import Sequence

import numpy as np

from cluster.routing_trace import RoutingTrace


def trace(
    *,
    arrival_s: Sequence[float] = (0.0,),
    prompt: int = 4,
    output: int = 5,
    num_layers: int = 2,
    num_experts: int = 4,
    popularity: Sequence[float] | None = None,
    num_tokens: int = 400,
    span_s: float = 100.0,
    seed: int = 0,
) -> RoutingTrace:
    """One expert a token, independent draws from `popularity` in every layer; all requests are alike."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(num_experts, (num_tokens, num_layers, 1), p=popularity)
    return RoutingTrace(
        num_experts=num_experts,
        arrival_s=np.array(arrival_s, np.float64),
        prompt_tokens=np.full(len(arrival_s), prompt, np.int32),
        output_tokens=np.full(len(arrival_s), output, np.int32),
        token_time_s=np.linspace(0, span_s, num_tokens),
        token_request=np.full(num_tokens, -1, np.int32),
        experts=chosen.astype(np.uint8),
    )
