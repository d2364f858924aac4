"""What a replica's answers tell about it: how long a call and a row take there, how busy it is, who else uses it.

For each replica as one coordinator sees it: the line a + b · rows, fitted online; what this coordinator has in flight
there; the tokens of the others, of which each answer says how many there were; and totals. From these the `Server` that
`selector` decides on is made. Seconds are of any one clock, told. Deadlines are `service_times`' matter, who is healthy
`replica_health`'s.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32

from cluster.ids import ReplicaId
from cluster.selector import Server
from cluster.service_time import AffineFit, ServiceTime

FIRST_GUESS = ServiceTime(5e-4, 1e-5)
"""Of any replica before anybody has answered; its shape (50 rows cost as much as the call) stays longer than that."""

BUSY_WINDOW_S = 10
"""Seconds that `busy_share` looks back."""

HALF_LIFE_S = 0.1
"""Of what an answer said about others' tokens."""

RECHECK_S = 1.0
"""Of a replica not heard of for longer little is known: it is thought twice as fast for each time as long that passes,
so that it is tried again, and what was measured before then counts half as much.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """One replica's totals since the coordinator's start, over all answers: hedges', probes' and retries' too.

    A call of `tokens` rows of one expert takes a_s + b_s · tokens seconds there. `busy_share` is the share of the last
    seconds in which it computed for this coordinator.
    """

    replica_id: ReplicaId
    calls_total: int
    tokens_total: int
    compute_us_total: int
    a_s: float
    b_s: float
    busy_share: float


class ReplicaTimes:
    """Of one replica. Telling it of an answer costs about a microsecond and a half; nothing in it grows."""

    __slots__ = (
        "_busy_us", "_fit", "_others", "_others_s", "_second", "_server", "_since_s",
        "calls", "calls_total", "compute_us_total", "measured_s", "replica_id", "tokens", "tokens_total",
    )  # fmt: skip

    def __init__(self, replica_id: ReplicaId, prior: ServiceTime = FIRST_GUESS) -> None:
        self.replica_id = replica_id
        self.calls = 0
        """This coordinator's in flight."""
        self.tokens = 0
        """This coordinator's in flight."""
        self.calls_total = self.tokens_total = self.compute_us_total = 0
        self.measured_s: float | None = None
        """When its last answer came."""
        self._fit = AffineFit(prior)
        self._server = Server(prior.a_s, prior.b_s)
        self._others = self._others_s = 0.0
        self._busy_us = [0] * BUSY_WINDOW_S
        self._second = 0
        self._since_s = 0.0

    @property
    def line(self) -> ServiceTime:
        """Of a call."""
        return self._fit.service_time

    def begin_anew(self, prior: ServiceTime) -> None:
        """Another process has its place: what was measured counts no longer."""
        self._fit, self.measured_s, self._others = AffineFit(prior), None, 0.0

    def answered(self, calls: int, tokens: int, compute_us: int, inflight_tokens: int, now_s: float) -> None:
        """Rows were computed, and are no longer in flight. `inflight_tokens` are everybody's there after them."""
        self.calls_total += calls
        self.tokens_total += tokens
        self.compute_us_total += compute_us
        if self.measured_s is not None and now_s - self.measured_s > RECHECK_S:
            self._fit.forget(_known(now_s - self.measured_s))
        self._fit.observe(tokens, compute_us * 1e-6, calls)
        others = inflight_tokens - self.tokens
        if self._others or others > 0:
            # Half of what is known and half of this: the others come and go.
            self._others = 0.5 * (self._others_at(now_s) + (others if others > 0 else 0))
            self._others_s = now_s
        self._since_s = self._since_s or now_s
        self.measured_s = now_s
        second = int(now_s)
        if second != self._second:
            self._roll(second)
        self._busy_us[second % BUSY_WINDOW_S] += compute_us

    def server(self, now_s: float) -> Server:
        """What it offers as of now; always the same object."""
        fit, server, measured_s = self._fit, self._server, self.measured_s
        if self._others or (measured_s is not None and now_s - measured_s > RECHECK_S):
            return self._guessed(now_s)
        a_s, b_s, tokens = fit.a_s, fit.b_s, self.tokens
        server.a_s, server.b_s, server.tokens = a_s, b_s, tokens
        server.ready_s = a_s * self.calls + b_s * tokens
        return server

    def _guessed(self, now_s: float) -> Server:
        """`server` where others have rows there too, or where nothing was heard of it for some time."""
        fit, server = self._fit, self._server
        a_s, b_s = fit.a_s, fit.b_s
        calls: float = self.calls
        tokens: float = self.tokens
        if self.measured_s is not None and now_s - self.measured_s > RECHECK_S:
            hope = _known(now_s - self.measured_s)
            a_s, b_s = hope * a_s, hope * b_s
        if self._others:
            others = self._others_at(now_s)
            calls += min(others, 1.0)  # how many calls these are in is not known
            tokens += others
        server.a_s, server.b_s, server.tokens = a_s, b_s, tokens
        server.ready_s = a_s * calls + b_s * tokens
        return server

    def others(self, now_s: float) -> float:
        """Tokens of other coordinators that are thought to be there."""
        return self._others_at(now_s) if self._others else 0.0

    def report(self, now_s: float) -> ReplicaReport:
        self._roll(int(now_s))
        seen_s = min(max(now_s - self._since_s, 1.0), BUSY_WINDOW_S - 1 + now_s % 1.0) if self._since_s else 1.0
        return ReplicaReport(
            replica_id=self.replica_id,
            calls_total=self.calls_total,
            tokens_total=self.tokens_total,
            compute_us_total=self.compute_us_total,
            a_s=self._fit.a_s,
            b_s=self._fit.b_s,
            busy_share=min(sum(self._busy_us) * 1e-6 / seen_s, 1.0),
        )

    def _others_at(self, now_s: float) -> float:
        others: float = self._others * 0.5 ** ((now_s - self._others_s) / HALF_LIFE_S)
        return others if others >= _NOBODY else 0.0

    def _roll(self, second: int) -> None:
        """Empties the slots of seconds that have passed."""
        passed = second - self._second
        if passed > 0:
            for at in range(self._second + 1, self._second + 1 + min(passed, BUSY_WINDOW_S)):
                self._busy_us[at % BUSY_WINDOW_S] = 0
            self._second = second


_LOOK_EVERY = 64  # messages
_NOBODY = 0.05  # tokens; less than that is forgotten


def _known(silent_s: float) -> float:
    """How much is still known of a replica that has not been heard of for so long, at least RECHECK_S."""
    known: float = 0.5 ** min(silent_s / RECHECK_S - 1, 60.0)
    return known


class TimesBook:
    """All replicas of one coordinator's map."""

    def __init__(self) -> None:
        self._times: dict[ReplicaId, ReplicaTimes] = {}
        self._usual = ServiceTime(0.0, 0.0)
        self._looks_in = 0

    def of(self, replica_id: ReplicaId) -> ReplicaTimes:
        """The replica's, new ones where there are none."""
        times = self._times.get(replica_id)
        if times is None:
            times = self._times[replica_id] = ReplicaTimes(replica_id, self.typical())
        return times

    def keep(self, replica_ids: Iterable[ReplicaId]) -> None:
        """Forgets all others."""
        self._times = {replica_id: self.of(replica_id) for replica_id in replica_ids}

    def typical(self) -> ServiceTime:
        """The mean line of those that were measured; a guess where nobody was."""
        lines = [one.line for one in self._times.values() if one.measured_s is not None]
        lines = [line for line in lines if line.a_s + line.b_s > 0]
        if not lines:
            return FIRST_GUESS
        return ServiceTime(sum(one.a_s for one in lines) / len(lines), sum(one.b_s for one in lines) / len(lines))

    def usual(self) -> ServiceTime:
        """The line of a usual replica, by its kernels: half of those measured are no slower. No time while nobody is.

        In the hot loop: who is usual is looked at now and then.
        """
        if self._looks_in == 0:
            self._looks_in = _LOOK_EVERY
            lines = [one.line for one in self._times.values() if one.measured_s is not None]
            middle = (len(lines) - 1) // 2
            if lines:
                self._usual = ServiceTime(
                    sorted([one.a_s for one in lines])[middle], sorted([one.b_s for one in lines])[middle]
                )
        self._looks_in -= 1
        return self._usual

    def usual_s(self, calls: int, rows: int) -> float:
        """How long so much work takes at a usual replica."""
        usual = self.usual()
        return usual.a_s * calls + usual.b_s * rows

    def reports(self, now_s: float) -> list[ReplicaReport]:
        """By id."""
        return [times.report(now_s) for _, times in sorted(self._times.items())]


def seat_of(coordinator_id: str) -> int:
    """A coordinator's number: `coordinator-3` has 3. One without a number at its end gets one from its letters."""
    digits = coordinator_id[len(coordinator_id.rstrip("0123456789")) :]
    return int(digits[-9:]) if digits else crc32(coordinator_id.encode())
