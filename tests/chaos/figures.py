"""What a trial came to, as numbers: gaps between tokens, wrong tokens, stalls, recovery, and whether a bar is kept.

Pure: streams with their arrival times in, figures out. Times are seconds on one monotonic clock.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.chaos.asks import Key

LATENCY_WINDOW_S = 1.0
LATENCY_FACTOR = 1.5


@dataclass(slots=True)
class Stream:
    """One request's answer as it arrives; `times_s` is parallel to `tokens`, `logprobs` too where asked for.

    `error` says why it failed; it is over when `ended_s` is set.
    """

    key: Key
    sent_s: float
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    ended_s: float | None = None
    error: str | None = None

    @property
    def whole(self) -> bool:
        """True when it ended as it should."""
        return self.ended_s is not None and self.error is None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request says when nothing is wrong."""

    tokens: tuple[int, ...]
    logprobs: tuple[float | None, ...] = ()


def answer_of(stream: Stream) -> Answer:
    """A stream's answer, its times forgotten."""
    return Answer(tuple(stream.tokens), tuple(stream.logprobs))


def wrong_tokens(stream: Stream, golden: Answer) -> int:
    """Tokens that are not the golden ones, by place; of a whole stream, missing ones too. A log-probability that
    differs makes its token wrong: it comes from other logits.
    """
    wrong = sum(mine != theirs for mine, theirs in zip(stream.tokens, golden.tokens, strict=False))
    wrong += max(0, len(stream.tokens) - len(golden.tokens))
    if stream.whole:
        wrong += max(0, len(golden.tokens) - len(stream.tokens))
    both = zip(stream.tokens, golden.tokens, stream.logprobs, golden.logprobs, strict=False)
    return wrong + sum(mine == theirs and said != meant for mine, theirs, said, meant in both)


def worst_gap_s(streams: Iterable[Stream]) -> float:
    """The longest that any stream waited between two tokens; for a failed one also from its last to its end."""
    return max((gap for stream in streams for gap in _gaps(stream)), default=0.0)


def worst_first_s(streams: Iterable[Stream]) -> float:
    """The longest that any stream waited for its first token."""
    return max((stream.times_s[0] - stream.sent_s for stream in streams if stream.times_s), default=0.0)


def token_rate(streams: Iterable[Stream], from_s: float, to_s: float) -> float:
    """Tokens per second, all streams together, in a stretch of time."""
    count = sum(from_s <= at_s < to_s for stream in streams for at_s in stream.times_s)
    return count / (to_s - from_s) if to_s > from_s else 0.0


def latency_back_s(streams: Sequence[Stream], baseline_rate: float, from_s: float, now_s: float) -> float | None:
    """When tokens came again nearly as fast as before: the start of the first window after `from_s` whose rate is at
    most LATENCY_FACTOR below `baseline_rate` (the number of streams stays the same, so rate is latency). None: not yet.
    """
    times = sorted(at_s for stream in streams for at_s in stream.times_s if at_s >= from_s)
    needed = max(1, math.ceil(baseline_rate / LATENCY_FACTOR * LATENCY_WINDOW_S))
    if now_s - from_s < LATENCY_WINDOW_S:
        return None
    for place, start_s in enumerate((from_s, *times)):
        end_s = start_s + LATENCY_WINDOW_S
        if end_s > now_s:
            return None
        if bisect_left(times, end_s) - max(0, place - 1) >= needed:
            return start_s
    return None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Nearest rank: of few values, a high percentile is the largest. None of none."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One fault under load, compared with the run without it.

    `gap_ms` is the worst gap between two tokens of any stream, `stall_ms` how much longer that (or the wait for a
    first token) was than without a fault, `recover_s` from the fault's end until the cluster was whole and as fast as
    before; None: not within its bound. `extra_calls` of `calls` to experts were hedges and retries; None: not counted.
    """

    failed: int = 0
    wrong_tokens: int = 0
    gap_ms: float = 0.0
    stall_ms: float = 0.0
    recover_s: float | None = 0.0
    extra_calls: int | None = None
    calls: int | None = None
    requests: int = 0
    tokens: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)
    rate_before: float = 0.0
    rate_during: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A row's limits; None is no limit. `text` is how the table says them."""

    text: str
    gap_ms: float | None = None
    stall_ms: float | None = None
    recover_s: float | None = None
    extra_calls_pct: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A row's line: what is printed as JSON, and the table's."""

    id: str
    repeats: int
    failed: int
    wrong_tokens: int
    stall_p50_ms: float | None
    stall_p99_ms: float | None
    recover_s: float | None
    extra_calls_pct: float | None
    bar: str
    held: bool
    note: str


def conclude(row_id: str, bar: Bar, trials: Sequence[Trial], broken: Sequence[str], notes: Sequence[str]) -> Finding:
    """A row's finding. `broken` are promises of its own that did not hold; a row without a trial does not hold."""
    stalls = [trial.stall_ms for trial in trials]
    recoveries = [trial.recover_s for trial in trials]
    recovered = max((one for one in recoveries if one is not None), default=None)
    extra = _extra_pct(trials)
    misses = [*_misses(bar, trials, extra), *broken]
    if not trials:
        misses.append("nothing was tried")
    return Finding(
        id=row_id,
        repeats=len(trials),
        failed=sum(trial.failed for trial in trials),
        wrong_tokens=sum(trial.wrong_tokens for trial in trials),
        stall_p50_ms=_rounded(percentile(stalls, 50)),
        stall_p99_ms=_rounded(percentile(stalls, 99)),
        recover_s=None if None in recoveries else _rounded(recovered),
        extra_calls_pct=_rounded(extra, 2),
        bar=bar.text,
        held=not misses,
        note="; ".join(dict.fromkeys((*misses, *notes))),
    )


def _misses(bar: Bar, trials: Sequence[Trial], extra_pct: float | None) -> list[str]:
    misses = []
    failed, wrong = sum(trial.failed for trial in trials), sum(trial.wrong_tokens for trial in trials)
    errors: dict[str, int] = {}
    for trial in trials:
        for name, count in trial.errors.items():
            errors[name] = errors.get(name, 0) + count
    if failed:
        most = sorted(errors.items(), key=lambda item: -item[1])[:3]
        misses.append(f"{failed} failed" + "".join(f" ({count} x {name})" for name, count in most))
    if wrong:
        misses.append(f"{wrong} wrong tokens")
    for name, limit, values, unit in (
        ("gap", bar.gap_ms, [trial.gap_ms for trial in trials], "ms"),
        ("stall", bar.stall_ms, [trial.stall_ms for trial in trials], "ms"),
        ("recovery", bar.recover_s, [math.inf if t.recover_s is None else t.recover_s for t in trials], "s"),
        ("extra calls", bar.extra_calls_pct, [] if extra_pct is None else [extra_pct], "%"),
    ):
        over = [value for value in values if limit is not None and value > limit]
        if over:
            misses.append(f"{name} {max(over):.4g} {unit} (limit {limit:g}) in {len(over)} of {len(values)}")
    if any(trial.recover_s is None for trial in trials) and bar.recover_s is None:
        misses.append("did not become whole and fast again in time")
    return misses


def _extra_pct(trials: Sequence[Trial]) -> float | None:
    counted = [trial for trial in trials if trial.calls and trial.extra_calls is not None]
    calls = sum(trial.calls or 0 for trial in counted)
    return 100.0 * sum(trial.extra_calls or 0 for trial in counted) / calls if calls else None


def _gaps(stream: Stream) -> Iterable[float]:
    yield from (later - earlier for earlier, later in itertools.pairwise(stream.times_s))
    if stream.error is not None and stream.ended_s is not None and stream.times_s:
        yield stream.ended_s - stream.times_s[-1]


def _rounded(value: float | None, digits: int = 1) -> float | None:
    return None if value is None else round(value, digits)
