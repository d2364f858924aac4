"""One process after another: which to start, which to end, so that those that are become those that should be.

Of a process nothing is known here but its id, its incarnation and what was last seen of it; it may hold experts or
coordinate. It believes nothing that it has not seen: a start that never shows is given up after a while and
tried again, after a pause that doubles up to a cap. `cluster.reconcile` makes expert maps on top of it; doing
the actions, and watching, is the supervisor's work.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum


class Phase(Enum):
    """The life of one process, as seen or as believed."""

    ABSENT = "absent"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class ProcessView:
    """What was seen last of a process. `incarnation` is that of the Start that made it.

    A process that does not answer any more is DEAD; `detail` says why.
    """

    process_id: str
    incarnation: int
    phase: Phase
    detail: str = ""

    def __post_init__(self) -> None:
        assert self.phase is not Phase.ABSENT, f"{self.process_id} is observed to be absent"


@dataclass(frozen=True, slots=True)
class Start:
    """Start a process of that id. There is none, as far as anybody knows."""

    process_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End a process; with `drain`, let it answer what it has first. It may not exist: then there is nothing to do."""

    process_id: str
    incarnation: int
    drain: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPolicy:
    """Times of the decisions, in seconds.

    A first failure is followed by a start at once, the n-th in a row (n > 1) by a pause of base · 2^(n -
    2), up to the cap.
    """

    backoff_base_s: float = 0.5
    backoff_cap_s: float = 30.0
    stable_s: float = 60.0
    """Ready for so long, a replica's earlier failures are forgotten."""
    start_timeout_s: float = 900.0
    stop_timeout_s: float = 60.0

    def backoff_s(self, failures: int) -> float:
        """Pause before the next start; 0 after the first failure."""
        if failures < 2:
            return 0.0
        return min(self.backoff_cap_s, self.backoff_base_s * math.ldexp(1.0, min(failures - 2, 64)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is believed of one process id: its phase since when, failures in a row, when it may be started.

    `seen` is True once this incarnation has been observed alive.
    """

    incarnation: int = 0
    seen: bool = False
    phase: Phase = Phase.ABSENT
    since_s: float = -math.inf
    failures: int = 0
    retry_at_s: float = -math.inf
    detail: str = ""


def keep(
    wanted: Collection[str],
    views: Iterable[ProcessView],
    now_s: float,
    records: Mapping[str, Record],
    *,
    blocked: Collection[str] = (),
    condemned: Mapping[str, str] | None = None,
    policy: ProcessPolicy | None = None,
) -> tuple[tuple[Start | Stop, ...], dict[str, Record]]:
    """At most one action for each process id, in order of ids, and the records for the next call.

    A view may be late, by less than the policy's timeouts. Ids in `blocked` are not started now. A process that
    is seen but not wanted is stopped. One that is ready and `condemned`, for the reason given, is stopped at once
    and has failed: another follows, after a pause if that has happened before.
    """
    rules = ProcessPolicy() if policy is None else policy
    seen = {view.process_id: view for view in views}
    after: dict[str, Record] = {}
    actions: list[Start | Stop] = []
    action: Start | Stop | None
    for process_id in sorted({*wanted, *seen, *records}):
        record = _believe(records.get(process_id, Record()), seen.get(process_id), now_s, rules)
        is_wanted = process_id in wanted
        crime = None if condemned is None else condemned.get(process_id)
        if crime is not None and is_wanted and record.phase is Phase.READY:
            record, action = _expel(record, process_id, now_s, rules, crime)
        else:
            record, action = _act(record, process_id, now_s, rules, wanted=is_wanted, blocked=process_id in blocked)
        if action is not None:
            actions.append(action)
        if is_wanted or process_id in seen or record.phase is not Phase.ABSENT:
            after[process_id] = record
    return tuple(actions), after


def _believe(record: Record, view: ProcessView | None, now_s: float, rules: ProcessPolicy) -> Record:
    """Take in what is seen. An older incarnation than the last one started says nothing about the new one."""
    if view is not None and view.incarnation < record.incarnation:
        view = None
    if view is None:
        return _without_process(record, now_s, rules, certain=record.seen)
    record = replace(record, incarnation=view.incarnation)
    if view.phase is Phase.DEAD:
        detail = record.detail if record.phase is Phase.STOPPING else view.detail  # why it was stopped says more
        return _without_process(replace(record, detail=detail), now_s, rules, certain=True)
    record = replace(record, seen=True)
    if record.phase is Phase.STOPPING:
        return record
    if view.phase is not record.phase:
        record = replace(record, phase=view.phase, since_s=now_s)
    if record.phase is Phase.READY and now_s - record.since_s >= rules.stable_s:
        record = replace(record, failures=0, detail="")
    return record


def _without_process(record: Record, now_s: float, rules: ProcessPolicy, *, certain: bool) -> Record:
    """Nothing alive is seen. Unless it is `certain` to be gone, a process may still be about to show."""
    if record.phase is Phase.ABSENT or (record.phase is Phase.STARTING and not certain):
        return record
    absent = replace(record, phase=Phase.ABSENT, since_s=now_s)
    if record.phase is Phase.STOPPING:
        return absent if certain or now_s - record.since_s >= rules.stop_timeout_s else record
    return _failed(absent, now_s, rules)


def _failed(record: Record, now_s: float, rules: ProcessPolicy) -> Record:
    failures = record.failures + 1
    return replace(record, failures=failures, retry_at_s=now_s + rules.backoff_s(failures))


def _expel(record: Record, process_id: str, now_s: float, rules: ProcessPolicy, crime: str) -> tuple[Record, Stop]:
    """No time to answer what it has: its answers are what is wrong with it."""
    record = replace(_failed(record, now_s, rules), phase=Phase.STOPPING, since_s=now_s, detail=crime)
    return record, Stop(process_id, record.incarnation, False, crime)


def _act(
    record: Record,
    process_id: str,
    now_s: float,
    rules: ProcessPolicy,
    *,
    wanted: bool,
    blocked: bool,
) -> tuple[Record, Start | Stop | None]:
    """At most one action for one process id: from what is believed to what is wanted."""
    age_s = now_s - record.since_s
    if record.phase is Phase.ABSENT:
        if not wanted or blocked or now_s < record.retry_at_s:
            return record, None
        next_one = record.incarnation + 1
        record = replace(record, incarnation=next_one, seen=False, phase=Phase.STARTING, since_s=now_s)
        return record, Start(process_id, next_one)
    stop: tuple[bool, str] | None = None
    if record.phase is Phase.STOPPING:
        if age_s >= rules.stop_timeout_s:
            stop = False, f"still there after {age_s:.0f} s of stopping"
    elif not wanted:
        stop = record.phase is Phase.READY, "not wanted any more"
    elif record.phase is Phase.STARTING and age_s >= rules.start_timeout_s:
        record = replace(_failed(record, now_s, rules), detail=f"not ready after {age_s:.0f} s")
        stop = False, record.detail
    if stop is None:
        return record, None
    drain, reason = stop
    record = replace(record, phase=Phase.STOPPING, since_s=now_s)
    return record, Stop(process_id, record.incarnation, drain, reason)
