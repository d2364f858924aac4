"""What another copy of an expert can bring: batches are done by one replica each, unless they are large.

While reading weights dominates, an expert's rows of a batch go to one of its replicas, whole (`selector`). So of k
copies as many help as there are batches at a time, and only the work of large batches is shared by all. Which moves to
make is `incremental`'s decision. Letters as in `layout`.
"""

from dataclasses import dataclass

import numpy as np

from cluster.layout import FloatArray, IntArray, critical_share
from cluster.layout_draft import Draft
from cluster.policy import Observation

LEAST_KEPT = 0.1
"""A copy is worth a look if it keeps so much of what it would bring were all work divisible."""


@dataclass(frozen=True, slots=True, eq=False)
class Indivisible:
    """`whole_LE` and `shared_LE` are all work: of batches that go to one replica, and of those that are shared."""

    whole_LE: FloatArray
    shared_LE: FloatArray
    batches: float

    @classmethod
    def of(cls, seen: Observation) -> "Indivisible | None":
        """None where it is not known, and all work is taken for divisible."""
        if seen.divisible_LE is None:
            return None
        return cls(np.maximum(seen.work_LE - seen.divisible_LE, 0.0), seen.divisible_LE, seen.batches)

    def limit(self, draft: Draft) -> None:
        """Lets no unit have more copies for balance where one more would bring next to nothing."""
        copies_U = np.maximum(draft.copies_U, 1)
        whole_U, shared_U = (
            np.add.reduceat(work_LE, draft.grain.bounds[:-1], axis=0).ravel()
            for work_LE in (self.whole_LE, self.shared_LE)
        )
        brings_U = self._wait(whole_U, shared_U, copies_U) - self._wait(whole_U, shared_U, copies_U + 1)
        promised_U = draft.work_U / (copies_U * (copies_U + 1))
        in_vain_U = brings_U < LEAST_KEPT * promised_U
        draft.most_U[in_vain_U] = np.minimum(draft.most_U, draft.copies_U)[in_vain_U]

    def waits(self, draft: Draft, which: int) -> float:
        """`critical_share`, but in this layer range no expert's batches are done before its fastest replica can be."""
        first, num_experts = which * draft.grain.num_experts, draft.grain.num_experts
        layers, units = draft.grain.layers(first), slice(first, first + num_experts)
        fastest_E = (draft.held_UN[units] * draft.speed_N).max(axis=1, initial=0.0)
        alone_lE = self._wait(self.whole_LE[layers], self.shared_LE[layers], np.maximum(draft.copies_U[units], 1))
        alone_l = (alone_lE / np.where(fastest_E > 0, fastest_E, np.inf)).max(axis=1)
        busiest_l = draft.busy_LN[layers].max(axis=1, initial=0.0)
        return critical_share(draft.busy_LN) + float(np.maximum(alone_l - busiest_l, 0.0).sum())

    def _wait(self, whole: FloatArray, shared: FloatArray, copies: IntArray) -> FloatArray:
        wait: FloatArray = whole / np.minimum(copies, self.batches) + shared / copies
        return wait
