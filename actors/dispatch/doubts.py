"""Answers that a replica cannot be meant to have given: which are honest all the same, and who lied.

A model may overflow, and its NaN is then the answer. So rows that are not finite, where what went in was, are asked
for again, at another replica where there is one. Two answers with the same bits are the model's own; where they
differ, whoever gave the strange one has a fault in memory or arithmetic. Asking again is
`actors.dispatch.recovery`'s.
"""

from dataclasses import dataclass

import torch

from actors.dispatch.replica_link import ReplicaLink
from actors.dispatch.replica_pool import ReplicaPool
from actors.dispatch.transport import ExpertRows
from model.numerics import same_bits


def is_strange(y_MD: torch.Tensor, x_MD: torch.Tensor) -> bool:
    """Whether an answer has rows that are not finite though what was asked for is."""
    return bool((~torch.isfinite(y_MD).all(dim=1) & torch.isfinite(x_MD).all(dim=1)).any())


@dataclass(frozen=True, slots=True, eq=False)
class _Doubt:
    """A strange answer, kept; None for one whose shape was wrong."""

    link: ReplicaLink
    incarnation: str
    rows_MD: torch.Tensor | None


class Doubts:
    """One round's."""

    def __init__(self, pool: ReplicaPool) -> None:
        self._pool = pool
        self._doubts: dict[tuple[int, int, int], list[_Doubt]] = {}

    def malformed(self, asked: ExpertRows, link: ReplicaLink) -> None:
        """An answer of another shape than the rows."""
        self._add(asked, link, None)

    def believes(self, asked: ExpertRows, link: ReplicaLink, y_MD: torch.Tensor, x_MD: torch.Tensor) -> bool:
        """Whether `y_MD` is the answer. If so, others who said something else are quarantined."""
        earlier = self._doubts.get(_key(asked), [])
        if is_strange(y_MD, x_MD):
            if any(one.rows_MD is not None and same_bits(one.rows_MD, y_MD) for one in earlier):
                liars = [one for one in earlier if one.rows_MD is None or not same_bits(one.rows_MD, y_MD)]
                return self._convict(liars, asked, link)
            self._add(asked, link, y_MD.clone())
            return False
        return self._convict(earlier, asked, link)

    def _convict(self, liars: list[_Doubt], asked: ExpertRows, witness: ReplicaLink) -> bool:
        """Whether the witness is none of them."""
        for one in liars:
            record = one.link.record
            if record.incarnation == one.incarnation and not record.quarantined:
                what = "an answer of a wrong shape" if one.rows_MD is None else "an answer that is not finite"
                other = "another time another" if one.link is witness else f"{witness.replica.replica_id} another"
                self._pool.quarantine(one.link, f"it gave {what} for expert {asked.expert_id}, {other}")
        return not witness.record.quarantined

    def _add(self, asked: ExpertRows, link: ReplicaLink, rows_MD: torch.Tensor | None) -> None:
        self._doubts.setdefault(_key(asked), []).append(_Doubt(link, link.record.incarnation, rows_MD))


def _key(asked: ExpertRows) -> tuple[int, int, int]:
    return asked.expert_id, asked.rows.start, asked.rows.stop
