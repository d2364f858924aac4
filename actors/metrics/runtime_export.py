"""Hands families of metrics to the runtime under the processes, whose own exporter shows them to Prometheus.

Ray calls them `ray_octavo_*`. It keeps the last value of every gauge for as long as the process lives, and counts
counters itself: so a series that ends is set to 0, and counters are given what they have grown by.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from actors.metrics.family import Family, LabelValues
from actors.metrics.increments import Increments

Record = Callable[[float, Mapping[str, str]], None]
"""Sets a gauge or adds to a counter, for one set of labels."""
MakeMetric = Callable[[Literal["gauge", "counter"], str, str, tuple[str, ...]], Record]
"""Of kind, name, help and names of labels."""


class RuntimeExport:
    """Used by one process, which exports again and again. Families that never had a sample are not made."""

    def __init__(self, make: MakeMetric) -> None:
        self._make = make
        self._records: dict[str, Record] = {}
        self._counted: dict[str, Increments] = {}
        self._shown: dict[str, frozenset[LabelValues]] = {}

    def export(self, families: Iterable[Family]) -> None:
        """The families as they are now."""
        for family in families:
            if not family.samples and family.name not in self._records:
                continue
            if family.name not in self._records:
                self._records[family.name] = self._make(family.kind, family.name, family.help, family.labels)
            if family.kind == "counter":
                self._count(family)
            else:
                self._set(family)

    def _count(self, family: Family) -> None:
        grown = self._counted.setdefault(family.name, Increments()).since_last(family.samples)
        for labels in family.samples:
            if grown[labels] > 0:
                self._record(family, labels, grown[labels])

    def _set(self, family: Family) -> None:
        for labels in self._shown.get(family.name, frozenset()) - family.samples.keys():
            self._record(family, labels, 0.0)
        self._shown[family.name] = frozenset(family.samples)
        for labels, value in family.samples.items():
            self._record(family, labels, value)

    def _record(self, family: Family, labels: LabelValues, value: float) -> None:
        self._records[family.name](value, dict(zip(family.labels, labels, strict=True)))
