"""What an upcycling made, as a value and in words for a person."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from model.config import ModelConfig
from model.upcycling.router_fit import RouterStats


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcycleReport:
    """What was made. `routers` holds each layer's behaviour on text that its router was not fitted to."""

    dest: Path
    config: ModelConfig
    dtype: torch.dtype
    weight_bytes: int
    calibration_tokens: int
    routers: tuple[RouterStats, ...]
    seconds: float

    def lines(self) -> list[str]:
        """The report for a person."""
        E, K, dtype = self.config.num_experts, self.config.top_k, str(self.dtype).removeprefix("torch.")
        weights = zip(*(router.top_weight for router in self.routers), strict=True)
        low, median, high = (statistics.median(values) for values in weights)
        chance = statistics.median(router.same_by_chance for router in self.routers)
        return [
            f"{E} experts, top-{K}, {dtype}, {self.weight_bytes / 1e9:.2f} GB in {self.seconds:.0f} s; "
            f"routers from {self.calibration_tokens:,} tokens of text",
            f"max/mean load per layer: {_spread([router.max_load for router in self.routers])}",
            f"same top expert for the next token: {_spread([router.same_next for router in self.routers])}, "
            f"by chance {chance:.2f}",
            f"weight of the first of two experts: {low:.2f} / {median:.2f} / {high:.2f} (5 / 50 / 95 % of tokens)",
        ]


def _spread(values: list[float]) -> str:
    low, median, high = min(values), statistics.median(values), max(values)
    return f"{low:.2f} / {median:.2f} / {high:.2f} (min / median / max over {len(values)} layers)"
