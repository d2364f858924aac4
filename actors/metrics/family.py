"""One metric with all its samples, as a value that every exporter understands, and how many samples there may be.

Names follow Prometheus' conventions and carry their unit; a counter's name has no `_total`, which exporters add. What
is measured is said in the other files of this package.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["gauge", "counter"]
Facts = Mapping[str, Any]
"""What a coordinator's snapshot says, as plain values: see `actors.metrics.facts`."""

MAX_EXPERT_SERIES = 4096
"""Series of one metric that has the label `expert`; with more, the label is `all` and the samples are sums."""
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)

LabelValues = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """`samples` by the values of `labels`, in their order."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    samples: Mapping[LabelValues, float] = field(default_factory=dict)


def by_quantile(values: Mapping[float, float]) -> dict[LabelValues, float]:
    """Samples with the label `quantile`."""
    return {(f"{quantile:g}",): value for quantile, value in values.items()}
