"""What a coordinator remembers of a replica, and the policy by which it is judged; see `cluster.replica_health`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from cluster.ids import ReplicaId
from cluster.service_times import TimeoutPolicy

MANY = 1 << 30
Answers: TypeAlias = list[tuple[float, float]]


class State(StrEnum):
    """What a replica's standing is called in reports."""

    HEALTHY = "healthy"
    EJECTED = "ejected"
    PROBING = "probing"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthPolicy:
    """When a replica is out, and when it may come back. Times in seconds.

    `strikes` overdue answers without `forget_after` timely ones in a row between them eject, and so does a silence
    beyond the deadline for as long again, `silence_s` at least. A replica is compared with its siblings when the
    mean of its last `sample` times is `outlier` times that of its peers and `least_gap_s` longer, or so are two times
    of half as many, or one that comes `seldom_s` after the last; and ejected when it is `worse` times the siblings'
    over `verdict` samples each (twice as much as that is seen after one). Means are without the longest eighth; a
    median would not see a replica that is slow in every third answer. After a comparison for nothing the next waits
    `compare_s`, doubling up to `most_compare_s`, or until it is twice as far behind.
    Ejection lasts `eject_s`, doubling up to `most_eject_s`, and begins small again after `forgive_s` of good behaviour.
    `probes` timely answers readmit, unless `bad_probes` others come before: one probe says little of a replica that
    is slow now and then, in either direction.
    """

    timeout: TimeoutPolicy = field(default_factory=TimeoutPolicy)
    hedge_share: float = 0.05
    hedge_burst: int = 32
    strikes: int = 3
    forget_after: int = 64
    silence_s: float = 0.5
    sample: int = 16
    verdict: int = 3
    outlier: float = 3.0
    worse: float = 2.0
    least_gap_s: float = 0.001
    seldom_s: float = 0.5
    compare_s: float = 1.0
    most_compare_s: float = 60.0
    comparison_s: float = 10.0
    eject_s: float = 1.0
    most_eject_s: float = 30.0
    forgive_s: float = 60.0
    probes: int = 8
    bad_probes: int = 5
    probe_gap_s: float = 0.02

    def __post_init__(self) -> None:
        if min(self.strikes, self.forget_after, self.sample, self.verdict, self.probes, self.bad_probes) < 1:
            raise ValueError(f"counts must be at least 1, got {self}")
        if not 1 < self.worse <= self.outlier or not 0 < self.eject_s <= self.most_eject_s:
            raise ValueError(f"1 < worse <= outlier and 0 < eject_s <= most_eject_s are expected, got {self}")


@dataclass(slots=True)
class Comparison:
    """Rows go to the replica and to its siblings in turns, so that neighbours are of one moment.

    Of each answer: its pace, and the pace that a usual replica's kernels would have for its rows. In its turns one
    has all of an expert's rows; its siblings may share them, and would take so much longer for all.
    """

    since_s: float
    theirs: dict[ReplicaId, Answers]
    own: Answers = field(default_factory=list)

    def ratios(self, least: int, usual: Callable[[Sequence[float]], float]) -> list[float]:
        """How many times longer it takes than each sibling that has so many answers too would for the same rows."""
        measured = [answers for answers in self.theirs.values() if min(len(answers), len(self.own)) >= least]
        if not measured:
            return []
        own, work = usual([pace for pace, _ in self.own]), _mean_work(self.own)
        return [
            own / max(usual([pace for pace, _ in answers]) + max(work - _mean_work(answers), 0.0), 1e-9)
            for answers in measured
        ]

    def fewest(self, least: int) -> int:
        """Answers of whoever has the fewest, of those that have so many."""
        return min(len(self.own), *(len(answers) for answers in self.theirs.values() if len(answers) >= least), MANY)


def _mean_work(answers: Answers) -> float:
    return sum(work for _, work in answers) / len(answers)


@dataclass(slots=True, eq=False)
class ReplicaRecord:
    """What is known of one replica. `rank` orders whom to ask: 0 as usual, 1 passed over, 2 only if all else fails,
    -1 whose turn it is in a comparison.

    `paces` are its latest times as multiples of what was typical, `pace` is their mean as of the last look, `lag` the
    same as a multiple of its peers'; its last answer came at `answered_s`, the last slow one was its `slow_at`th;
    `silent_since_s` is set while an answer is overdue.
    """

    replica_id: ReplicaId
    state: State = State.HEALTHY
    detail: str = ""
    rank: int = 0
    ejections_total: int = 0
    incarnation: str = ""
    paces: list[float] = field(default_factory=list)
    pace: float = 1.0
    answers: int = 0
    answered_s: float = float("-inf")
    slow_at: int = -MANY
    silent_since_s: float | None = None
    silent_until_s: float = 0.0
    comparison: Comparison | None = None
    strikes: int = 0
    in_time: int = 0
    level: int = 0
    until_s: float = 0.0
    readmitted_s: float = float("-inf")
    compare_from_s: float = float("-inf")
    compare_pause_s: float = 0.0
    lag: float = 1.0
    compared_lag: float = 0.0
    probe_until_s: float | None = None
    probes_good: int = 0
    probes_bad: int = 0

    def begin_anew(self) -> None:
        """What was measured counts no longer."""
        self.paces, self.pace, self.answers, self.strikes, self.slow_at = [], 1.0, 0, 0, -MANY
        self.compare_from_s, self.compare_pause_s, self.compared_lag = float("-inf"), 0.0, 0.0

    @property
    def quarantined(self) -> bool:
        return self.state is State.QUARANTINED
