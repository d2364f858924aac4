"""What was seen of a cluster at one moment, and as much of the moments before as rates and percentiles need.

Values and arithmetic only: who looks is `actors.window.front_view` and `actors.command.top`, what is shown of it
`actors.window.snapshot`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from actors.metrics.family import Facts
from actors.supervision.status import ClusterStatus

RATE_S = 5.0
"""Rates are means over about so long."""
LATENCY_S = 60.0
"""Percentiles are of what was observed in about so long."""
MAX_EPOCHS = 16

Life = tuple[str, int]
"""One life of one coordinator: its id and its process."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram as Prometheus has it: upper bounds in seconds, and how many observations are not above each."""

    bounds_s: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()

    def since(self, before: "Buckets") -> "Buckets":
        """What was observed after `before`; all of it, where that is another histogram."""
        if before.bounds_s != self.bounds_s:
            return self
        return Buckets(self.bounds_s, tuple(now - then for now, then in zip(self.counts, before.counts, strict=True)))

    @property
    def total(self) -> int:
        """Number of observations."""
        return self.counts[-1] if self.counts else 0

    def quantile(self, share: float) -> float | None:
        """The value that `share` of the observations are not above, in seconds; None of none.

        Within a bucket observations count as evenly spread, as in Prometheus' `histogram_quantile`; of what is above
        the last finite bound, that bound is all that is known.
        """
        if self.total <= 0:
            return None
        rank = share * self.total
        lower_s, below = 0.0, 0
        for bound_s, count in zip(self.bounds_s, self.counts, strict=True):
            if count >= rank and count > below:
                if bound_s == float("inf"):
                    return lower_s
                return lower_s + (bound_s - lower_s) * max(0.0, rank - below) / (count - below)
            lower_s, below = bound_s, count
        return lower_s


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontCounts:
    """What only the front door knows, since its start: requests under way, times to first and between tokens."""

    num_inflight: int
    ttft: Buckets
    itl: Buckets


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One look. `at_s` is in seconds since 1970, `clock_s` of a clock that never goes back.

    `status` is the supervisor's last word, `status_age_s` old; None while it is away or there is none. `front` is None
    for those who look without a front door.
    """

    at_s: float
    clock_s: float
    status: ClusterStatus | None = None
    status_age_s: float = 0.0
    coordinators: Sequence[Facts] = ()
    coordinators_age_s: float = 0.0
    front: FrontCounts | None = None

    @property
    def epoch(self) -> int | None:
        """That of the map in force: the supervisor's, or without one the newest that a coordinator uses."""
        if self.status is not None:
            return self.status.map_epoch
        return max((int(facts.get("map_epoch", 0)) for facts in self.coordinators), default=None)


@dataclass(frozen=True, slots=True)
class Tally:
    """The part of a reading that later ones are compared with: totals by life, prompt and generated tokens."""

    clock_s: float
    tokens: Mapping[Life, tuple[int, int]]
    front: FrontCounts | None


@dataclass(frozen=True, slots=True)
class History:
    """Tallies of the last `LATENCY_S`, the oldest first, and the last epochs with when each was first seen."""

    tallies: tuple[Tally, ...] = ()
    epochs: tuple[tuple[int, float], ...] = field(default=())

    def after(self, reading: Reading) -> "History":
        """With one reading more."""
        kept = [one for one in self.tallies if reading.clock_s - one.clock_s <= LATENCY_S]
        epochs = self.epochs
        if reading.epoch is not None and (not epochs or epochs[-1][0] != reading.epoch):
            epochs = (*epochs, (reading.epoch, reading.at_s))[-MAX_EPOCHS:]
        return History((*kept, _tally(reading)), epochs)

    def tokens_per_s(self, life: Life) -> tuple[float, float] | None:
        """Prompt and generated tokens a second of one coordinator's life; None before it was seen twice."""
        seen = [one for one in self._recent() if life in one.tokens]
        if len(seen) < 2:
            return None
        (prompt_0, generated_0), (prompt_1, generated_1) = seen[0].tokens[life], seen[-1].tokens[life]
        took_s = seen[-1].clock_s - seen[0].clock_s
        return (prompt_1 - prompt_0) / took_s, (generated_1 - generated_0) / took_s

    def observed(self) -> tuple[Buckets, Buckets] | None:
        """Times to first token and between tokens that were observed lately; None without a front door."""
        fronts = [one.front for one in self.tallies if one.front is not None]
        if not fronts:
            return None
        return fronts[-1].ttft.since(fronts[0].ttft), fronts[-1].itl.since(fronts[0].itl)

    def _recent(self) -> Iterator[Tally]:
        now_s = self.tallies[-1].clock_s if self.tallies else 0.0
        return (one for one in self.tallies if now_s - one.clock_s <= RATE_S)


def life_of(facts: Facts) -> Life:
    """Which life of which coordinator says this."""
    return str(facts["coordinator_id"]), int(facts.get("pid", 0))


def _tally(reading: Reading) -> Tally:
    tokens = {
        life_of(facts): (int(facts.get("prompt_tokens_total", 0)), int(facts.get("generated_tokens_total", 0)))
        for facts in reading.coordinators
    }
    return Tally(reading.clock_s, tokens, reading.front)
