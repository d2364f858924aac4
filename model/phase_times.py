"""Where a forward's time goes, phase by phase: running totals, cheap enough to keep always.

Who reads them, and what the experts and the sampler take beside, is left to the engine and its reports.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class PhaseTimes:
    """Seconds of one backbone since start.

    `prepare_s`: the attention plan and the embeddings; `attention_s`: norm, q/k/v, attention, output product;
    `router_s`: norm and gate; `dispatch_s`: choosing experts and sorting rows; `combine_s`: the weighted sum;
    `head_s`: logits.
    """

    prepare_s: float = 0.0
    attention_s: float = 0.0
    router_s: float = 0.0
    dispatch_s: float = 0.0
    combine_s: float = 0.0
    head_s: float = 0.0
