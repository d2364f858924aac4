"""Who among the replicas is passed over, ejected, probed, taken back, or never believed again.

A replica that keeps somebody waiting past the deadline is passed over until it answers; one that does so again and
again, or stays silent, is ejected. One that is merely slow is found by comparison: seen to be slower than its peers, it
takes turns with its siblings for a while, and if those prove much faster with the same work, it is ejected. After a
growing pause an ejected replica is probed, and taken back when its answers come in time. The last one that an expert
has is never ejected. One that gave a wrong answer is quarantined until another process has its place.

Pure bookkeeping: times are told (seconds of any one clock), who is connected and who could stand in is asked.
Sending, hedging and probing are `actors.dispatch`'s.
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from cluster.hedge_budget import HedgeBudget
from cluster.ids import ReplicaId
from cluster.replica_record import Comparison, HealthPolicy, ReplicaRecord, State
from cluster.service_times import ServiceTimes

MAX_RECORDS = 512
"""Replicas remembered, at most: those of the map, and those in quarantine."""

Siblings = Callable[[ReplicaId], Sequence[ReplicaRecord] | None]
"""Others, not passed over, that can be asked now and hold what this one holds; None where one of its experts has none.
"""


def late_together(late: int, asked: int) -> bool:
    """Whether so many late replicas, of those asked in a round, rather mean a slow machine: nobody is to blame yet."""
    return late > 1 and 2 * late > asked


def usual(paces: Sequence[float]) -> float:
    """The mean without the longest eighth: a hiccup does not count, being slow now and then does."""
    kept = sorted(paces)[: len(paces) - len(paces) // 8]
    return sum(kept) / len(kept)


class HealthBook:
    """One coordinator's. `siblings` is asked whenever somebody is about to be passed over."""

    def __init__(self, siblings: Siblings, policy: HealthPolicy | None = None) -> None:
        self.policy = policy or HealthPolicy()
        self.times = ServiceTimes(self.policy.timeout)
        self.budget = HedgeBudget(self.policy.hedge_share, self.policy.hedge_burst)
        self.watching = False
        """Whether anybody is to be reviewed; looked at before every round."""
        self._siblings = siblings
        self._records: dict[ReplicaId, ReplicaRecord] = {}
        self._compared: list[ReplicaRecord] = []

    def record(self, replica_id: ReplicaId) -> ReplicaRecord:
        """The replica's record, a new one where there is none."""
        return self._records.setdefault(replica_id, ReplicaRecord(replica_id))

    def keep(self, replica_ids: Iterable[ReplicaId]) -> None:
        """Forgets all others, but not who is in quarantine, as long as there is room."""
        kept = {replica_id: self.record(replica_id) for replica_id in replica_ids}
        others = [one for one in self._records.values() if one.replica_id not in kept and one.quarantined]
        room = max(0, MAX_RECORDS - len(kept))
        self._records = kept | {one.replica_id: one for one in others[len(others) - room :]}

    # ---- what is seen --------------------------------------------------------------------------------

    def connected(self, record: ReplicaRecord, incarnation: str, now_s: float) -> None:
        """A connection was made. Another process than before begins anew; the same one keeps its standing."""
        if incarnation != record.incarnation:
            record.begin_anew()
            record.level = 0
            record.incarnation = incarnation
            self._clear(record)
        elif record.state in (State.EJECTED, State.PROBING):
            record.state, record.until_s, record.probe_until_s = State.EJECTED, now_s, None
        elif record.state is State.HEALTHY:
            self._clear(record)

    def answered(self, record: ReplicaRecord, size: int, seconds: float, now_s: float, work_s: float = 0.0) -> None:
        """An answer came first, `seconds` after its rows were sent in a round of this size. In the hot loop.

        `work_s`: what a usual replica would compute for those rows. Nobody is slow for having had more than others.
        """
        pace, answers, sample = self.times.add(size, seconds), record.answers, self.policy.sample
        if self._compared:
            self._take_turns(record, pace, pace * work_s / max(seconds, 1e-9))
        if pace * work_s > seconds:
            pace = seconds / work_s
        if answers < sample:
            record.paces.append(pace)
        else:
            record.paces[answers % sample] = pace
        record.answers = answers + 1
        before_s, record.answered_s = record.answered_s, now_s
        if record.strikes:
            record.in_time += 1
            if record.in_time >= self.policy.forget_after:
                record.strikes = 0
        if record.answers % sample == 0:
            record.pace = usual(record.paces)
            self._look_for_outlier(record, size, now_s)
        elif pace >= self.policy.outlier and record.answers > sample:
            if record.answers - record.slow_at <= sample // 2 or now_s - before_s >= self.policy.seldom_s:
                self._look_at_slow_answer(record, (pace - 1) * self.times.typical_s(size), now_s)
            record.slow_at = record.answers

    def spoke(self, record: ReplicaRecord) -> None:
        """It answered something, however late: it is silent no longer."""
        if record.silent_since_s is not None:
            record.silent_since_s = None
            if record.state is State.HEALTHY and record.comparison is None:
                self._clear(record)

    def overdue(self, record: ReplicaRecord, waited_s: float, now_s: float) -> None:
        """An answer is overdue, and there is somebody else to ask."""
        if record.state is not State.HEALTHY or self._siblings(record.replica_id) is None:
            return
        if record.silent_since_s is not None:
            if now_s > record.silent_until_s:
                self._eject(record, f"silent; {record.detail}", now_s)
            return
        record.silent_since_s = now_s
        record.silent_until_s = now_s + max(waited_s, self.policy.silence_s)
        record.strikes += 1
        record.in_time = 0
        record.rank = 1
        record.detail = f"no answer within {waited_s:.3g} s"
        self.watching = True
        if record.strikes >= self.policy.strikes:
            self._eject(record, f"{record.strikes} times {record.detail}", now_s)

    def quarantine(self, record: ReplicaRecord, why: str) -> None:
        """It gave a wrong answer: never again, until another process has its place."""
        record.state, record.detail, record.rank = State.QUARANTINED, why, 2
        record.comparison = record.silent_since_s = record.probe_until_s = None

    def probe_sent(self, record: ReplicaRecord, until_s: float) -> None:
        """A probe is under way, and lost if it is not answered by then."""
        if record.state is not State.PROBING:
            record.state, record.probes_good, record.probes_bad = State.PROBING, 0, 0
        record.probe_until_s = until_s

    def probe_ended(self, record: ReplicaRecord, good: bool | None, now_s: float) -> None:
        """A probe was answered in time and rightly, or not; None: the connection broke, which says nothing."""
        if record.state is not State.PROBING or record.probe_until_s is None:
            return
        record.probe_until_s = None
        record.until_s = now_s + self.policy.probe_gap_s
        record.probes_good += good is True
        record.probes_bad += good is False
        if record.probes_good >= self.policy.probes:
            record.readmitted_s = now_s
            record.begin_anew()
            self._clear(record)
        elif record.probes_bad >= self.policy.bad_probes:
            self._out(record, "probed and found slow", now_s)

    # ---- what follows --------------------------------------------------------------------------------

    def review(self, now_s: float) -> list[ReplicaRecord]:
        """Moves on whoever is not simply healthy, and returns those that wait for a probe."""
        busy = False
        probes = []
        for record in self._records.values():
            if record.silent_since_s is not None and now_s > record.silent_until_s:
                self._eject(record, f"silent; {record.detail}", now_s)
            if record.comparison is not None:
                self._compare(record, record.comparison, now_s)
            if record.probe_until_s is not None:
                if now_s > record.probe_until_s:
                    self._out(record, "probed and silent", now_s)
            elif record.state in (State.EJECTED, State.PROBING) and now_s >= record.until_s:
                probes.append(record)
            busy |= record.rank > 0 and not record.quarantined
        self._compared = [record for record in self._compared if record.comparison is not None]
        self.watching = busy or bool(self._compared)
        return probes

    def reinstate(self) -> None:
        """Somebody left: who is now the last for one of its experts is taken back, whatever it did."""
        for record in self._records.values():
            if record.rank and not record.quarantined and self._siblings(record.replica_id) is None:
                self._clear(record)
                record.detail = "the last one that an expert has"

    def good_probe_s(self, size: int, siblings: Sequence[ReplicaRecord]) -> float:
        """How long a probe in a round of this size may take: `worse` times what its siblings would."""
        typical_s = self.times.typical_s(size) * max([1.0, *(one.pace for one in siblings)])
        good_s = max(self.policy.worse * typical_s, typical_s + self.policy.least_gap_s)
        return min(good_s, self.policy.timeout.most_s)

    def _look_for_outlier(self, record: ReplicaRecord, size: int, now_s: float) -> None:
        if record.rank or record.comparison is not None:
            return
        policy = self.policy
        peers = [one for one in self._records.values() if one is not record and one.rank <= 0]
        paces = [one.pace for one in peers if one.answers >= policy.sample]
        record.lag = record.pace / max(median(paces), 1e-9) if paces else 1.0
        gap_s = (record.pace - 1) * self.times.typical_s(size)
        if paces and (record.lag < policy.outlier or gap_s < policy.least_gap_s):
            return
        if now_s < record.compare_from_s and record.lag < 2 * record.compared_lag:
            return  # that was found to be nobody's fault
        self._begin_comparison(record, now_s)

    def _look_at_slow_answer(self, record: ReplicaRecord, gap_s: float, now_s: float) -> None:
        """Who becomes slow is hardly asked any more where there are others (`cluster.selector`), and would never be
        looked at: where answers are seldom, one is reason enough to compare. Else one is a hiccup, two soon are not.
        """
        if gap_s >= self.policy.least_gap_s and now_s >= record.compare_from_s:
            self._begin_comparison(record, now_s)

    def _begin_comparison(self, record: ReplicaRecord, now_s: float) -> None:
        """Unless there is nobody to compare it with."""
        if record.rank or record.comparison is not None:
            return
        siblings = self._siblings(record.replica_id)
        if siblings is None or any(one.comparison is not None for one in siblings):
            return
        record.comparison = Comparison(now_s, {one.replica_id: [] for one in siblings})
        record.detail = "compared with its siblings"
        self._compared.append(record)
        self.watching = True

    def _take_turns(self, record: ReplicaRecord, pace: float, work: float) -> None:
        """Whoever is compared has the next rows when a sibling had the last ones, and the other way round.

        `work` is what a usual replica would compute, in units of `pace`.
        """
        for one in self._compared:
            comparison = one.comparison
            if comparison is None:
                continue
            if one is record:
                comparison.own.append((pace, work))
                one.rank = 1
            elif record.replica_id in comparison.theirs:
                comparison.theirs[record.replica_id].append((pace, work))
                one.rank = -1 if one.silent_since_s is None else 1

    def _compare(self, record: ReplicaRecord, comparison: Comparison, now_s: float) -> None:
        """Ends the comparison when both sides have been measured, or nothing came of it."""
        policy = self.policy
        ratios = comparison.ratios(policy.sample, usual)
        few = comparison.fewest(policy.sample) < policy.verdict * policy.sample
        close = few and bool(ratios) and 1 < min(ratios) <= 2 * policy.worse
        alone = self._siblings(record.replica_id) is None
        if (not ratios or close) and not alone and now_s - comparison.since_s < policy.comparison_s:
            return
        record.comparison = None
        if ratios and min(ratios) > policy.worse:
            self._eject(record, f"{min(ratios):.1f} times slower than its siblings", now_s)
            return
        record.compared_lag = record.lag
        record.compare_pause_s = min(max(2 * record.compare_pause_s, policy.compare_s), policy.most_compare_s)
        record.compare_from_s = now_s + record.compare_pause_s
        if record.silent_since_s is None:
            self._clear(record)

    def _eject(self, record: ReplicaRecord, why: str, now_s: float) -> None:
        if record.state is not State.HEALTHY:
            return None
        if self._siblings(record.replica_id) is None:
            return self._clear(record)
        if now_s - record.readmitted_s > self.policy.forgive_s:
            record.level = 0
        record.ejections_total += 1
        return self._out(record, why, now_s)

    def _out(self, record: ReplicaRecord, why: str, now_s: float) -> None:
        """Out, for longer than the last time."""
        record.state, record.detail, record.rank = State.EJECTED, why, 2
        record.until_s = now_s + min(self.policy.eject_s * 2**record.level, self.policy.most_eject_s)
        record.level = min(record.level + 1, 32)
        record.comparison = record.silent_since_s = record.probe_until_s = None
        self.watching = True

    def _clear(self, record: ReplicaRecord) -> None:
        record.state, record.detail, record.rank = State.HEALTHY, "", 0
        record.comparison = record.silent_since_s = record.probe_until_s = None
