"""Answers teach how fast a replica is, how busy, and who else is there; coordinators that learn so do not collide."""

import heapq
import random
from collections.abc import Callable, Mapping

import pytest

from cluster.ids import ReplicaId
from cluster.replica_times import (
    BUSY_WINDOW_S,
    FIRST_GUESS,
    HALF_LIFE_S,
    RECHECK_S,
    ReplicaTimes,
    TimesBook,
    seat_of,
)
from cluster.selector import Selector
from cluster.service_time import ServiceTime

A, B = ReplicaId("a"), ReplicaId("b")


def told(times: ReplicaTimes, num: int, line: ServiceTime, now_s: float = 100.0, inflight: int = 0) -> None:
    """So many answers of one call each, of 1 to 64 rows."""
    for at in range(num):
        tokens = (1, 8, 64)[at % 3]
        times.answered(1, tokens, round(line.seconds(tokens) * 1e6), inflight, now_s)


# ---- speed ------------------------------------------------------------------------------------------------


def test_unequal_replicas_show_as_unequal_lines() -> None:
    book = TimesBook()
    fast, slow = ServiceTime(1e-3, 2e-5), ServiceTime(4e-3, 8e-5)
    for replica_id, line in ((A, fast), (B, slow)):
        told(book.of(replica_id), 300, line)
    first, second = book.reports(100.0)
    assert (first.replica_id, second.replica_id) == (A, B)
    assert (first.a_s, first.b_s) == pytest.approx((1e-3, 2e-5), rel=0.05)
    assert second.a_s / first.a_s == pytest.approx(4, rel=0.1)
    assert second.b_s / first.b_s == pytest.approx(4, rel=0.1)
    assert (first.calls_total, first.tokens_total) == (300, 100 * (1 + 8 + 64))
    assert first.compute_us_total == pytest.approx(1e6 * (300 * 1e-3 + 7300 * 2e-5), rel=1e-3)


def test_messages_for_several_experts_teach_the_time_of_one() -> None:
    times = ReplicaTimes(A)
    rng = random.Random(0)
    for _ in range(300):
        calls = rng.randint(1, 6)
        tokens = sum(rng.choice([1, 4, 40]) for _ in range(calls))
        times.answered(calls, tokens, round(1e6 * (calls * 2e-3 + tokens * 5e-5)), 0, 1.0)
    assert (times.line.a_s, times.line.b_s) == pytest.approx((2e-3, 5e-5), rel=0.05)


def test_a_newcomer_is_thought_to_be_like_the_others() -> None:
    book = TimesBook()
    assert book.of(A).line == FIRST_GUESS
    told(book.of(A), 300, ServiceTime(1e-3, 2e-5))
    told(book.of(B), 300, ServiceTime(3e-3, 4e-5))
    newcomer = book.of(ReplicaId("c")).line
    assert (newcomer.a_s, newcomer.b_s) == pytest.approx((2e-3, 3e-5), rel=0.05)
    book.of(A).begin_anew(book.typical())
    assert book.of(A).line.a_s == pytest.approx(2e-3, rel=0.05), "another process: what was measured counts no longer"
    assert book.of(A).calls_total == 300


def test_who_computes_in_no_time_teaches_nobody_that() -> None:
    book = TimesBook()
    book.of(A).answered(1, 4, 0, 0, 1.0)
    assert book.of(A).line == ServiceTime(0.0, 0.0)
    assert book.of(B).line == FIRST_GUESS


def test_only_those_of_the_map_are_kept() -> None:
    book = TimesBook()
    told(book.of(A), 30, FIRST_GUESS)
    book.keep([A, B])
    assert book.of(A).calls_total == 30
    book.keep([B])
    assert [one.replica_id for one in book.reports(1.0)] == [B]
    assert book.of(A).calls_total == 0


def test_a_slow_replica_not_heard_of_is_tried_again_some_time() -> None:
    times = ReplicaTimes(A)
    told(times, 30, ServiceTime(1e-2, 1e-4), now_s=5.0)
    a_s = times.server(5.0).a_s
    assert times.server(5.0 + RECHECK_S).a_s == a_s == times.line.a_s
    assert times.server(5.0 + 5 * RECHECK_S).a_s == pytest.approx(a_s / 16)
    times.answered(1, 8, 10_800, 0, 15.0)
    assert times.server(15.0).a_s == pytest.approx(1e-2, rel=0.1), "it is still as slow"
    times.answered(1, 8, 1_080, 0, 25.0)
    assert times.server(25.0).a_s == pytest.approx(1e-3, rel=0.1), "what was measured long ago counts no more"
    times.answered(1, 8, 108_000, 0, 35.0)
    assert times.server(35.0).a_s == pytest.approx(1e-1, rel=0.1)
    assert times.server(1e9).a_s > 0


# ---- how busy ---------------------------------------------------------------------------------------------


def test_the_busy_share_is_of_the_last_seconds() -> None:
    times = ReplicaTimes(A)
    assert times.report(50.0).busy_share == 0.0
    for tenth in range(10 * 2 * BUSY_WINDOW_S):
        times.answered(1, 1, 25_000, 0, 1000.0 + tenth / 10)
    end_s = 1000.0 + 2 * BUSY_WINDOW_S
    assert times.report(end_s - 0.1).busy_share == pytest.approx(0.25, rel=0.02)
    assert times.report(end_s + BUSY_WINDOW_S / 2 - 0.5).busy_share == pytest.approx(0.125, rel=0.15)
    assert times.report(end_s + BUSY_WINDOW_S).busy_share == 0.0
    assert times.report(end_s + 1e6).busy_share == 0.0


def test_a_young_replica_is_not_thought_idle_for_the_time_before_it() -> None:
    times = ReplicaTimes(A)
    for tenth in range(20):
        times.answered(1, 1, 50_000, 0, 1000.5 + tenth / 10)
    assert times.report(1002.5).busy_share == pytest.approx(0.5, rel=0.1)
    times.answered(1, 1, 10**9, 0, 1002.5)
    assert times.report(1002.5).busy_share == 1.0


# ---- who else is there ------------------------------------------------------------------------------------


def test_own_rows_and_others_make_the_backlog() -> None:
    times = ReplicaTimes(A)
    told(times, 30, ServiceTime(1e-3, 1e-5))
    line, idle = times.line, times.server(100.0)
    assert (idle.a_s, idle.b_s, idle.ready_s, idle.tokens) == (line.a_s, line.b_s, 0, 0)
    times.calls, times.tokens = 2, 12
    busy = times.server(100.0)
    assert (busy.a_s, busy.b_s, busy.ready_s, busy.tokens) == (line.a_s, line.b_s, line.a_s * 2 + line.b_s * 12, 12)
    times.answered(1, 8, 1080, 12, 100.0)
    assert times.others(100.0) == 0, "all twelve are its own"
    for _ in range(20):
        times.answered(1, 8, 1080, 12 + 40, 100.0)
    assert times.others(100.0) == pytest.approx(40, rel=0.01)
    line, busy = times.line, times.server(100.0)
    assert busy.tokens == pytest.approx(52, rel=0.01)
    assert busy.ready_s == pytest.approx(3 * line.a_s + 52 * line.b_s, rel=0.01)


def test_what_was_heard_of_others_fades() -> None:
    times = ReplicaTimes(A)
    for _ in range(20):
        times.answered(1, 8, 1000, 64, 10.0)
    assert times.others(10.0 + HALF_LIFE_S) == pytest.approx(32, rel=0.01)
    assert times.others(10.0 + 20 * HALF_LIFE_S) == 0
    assert times.server(10.0 + 20 * HALF_LIFE_S).ready_s == 0
    times.answered(1, 8, 1000, 0, 10.0)
    assert times.others(10.0) == pytest.approx(32, rel=0.01), "half of what was known, half of what is said"


Rule = Callable[[int, Mapping[int, ReplicaTimes], float], int]
"""Which server gets a coordinator's rows now."""


def selector(seat: int, times: Mapping[int, ReplicaTimes], now_s: float) -> int:
    ((chosen, _),) = Selector(seat=seat).assign([8], [[one.server(now_s) for one in times.values()]])[0]
    return chosen


def fewest_of_its_own(_seat: int, times: Mapping[int, ReplicaTimes], _now_s: float) -> int:
    return min(times, key=lambda at: (times[at].tokens, at))


def rounds_per_second(
    rule: Rule, *, coordinators: int, speeds: list[float], think_s: float = 1e-3, seconds: float = 2.0
) -> tuple[float, float]:
    """Rounds of all coordinators, each of which sends 8 rows, waits for them and thinks; and how often all of them
    were at one server. A server computes in the order of arrival.
    """
    rng = random.Random(1)
    times = [{at: ReplicaTimes(ReplicaId(f"r{at}")) for at in range(len(speeds))} for _ in range(coordinators)]
    free_s, queued = [0.0] * len(speeds), [0] * len(speeds)
    events: list[tuple[float, int, int, float]] = [(1.0, seat, -1, 0.0) for seat in range(coordinators)]
    rounds = choices = together = 0
    at_server = [0] * coordinators
    while events[0][0] < 1.0 + seconds:
        now_s, seat, server, work_s = heapq.heappop(events)
        if server < 0:
            server = at_server[seat] = rule(seat, times[seat], now_s)
            work_s = (1e-3 + 8e-5) / speeds[server]
            free_s[server] = max(free_s[server], now_s) + work_s
            queued[server] += 8
            times[seat][server].calls += 1
            times[seat][server].tokens += 8
            heapq.heappush(events, (free_s[server], seat, server, work_s))
            choices += 1
            together += len(set(at_server)) == 1
            continue
        queued[server] -= 8
        times[seat][server].calls -= 1
        times[seat][server].tokens -= 8
        times[seat][server].answered(1, 8, round(work_s * 1e6), queued[server], now_s)
        rounds += 1
        heapq.heappush(events, (now_s + think_s * rng.uniform(0.7, 1.3), seat, -1, 0.0))
    return rounds / seconds, together / choices


@pytest.mark.parametrize(
    ("coordinators", "speeds", "gain"),
    [(2, [1.0, 1.0], 1.04), (4, [1.0, 1.0], 1.6), (4, [1.0, 2.0], 2.1), (8, [1.0, 1.0, 1.0, 2.0], 3.2)],
)
def test_coordinators_that_hear_of_each_other_share_the_servers(
    coordinators: int, speeds: list[float], gain: float
) -> None:
    """Against each one's knowledge of its own rows, by which all of them choose the same server all the time."""
    alone, always = rounds_per_second(fewest_of_its_own, coordinators=coordinators, speeds=speeds)
    got, together = rounds_per_second(selector, coordinators=coordinators, speeds=speeds)
    assert always == 1.0
    assert together < 0.5, "one server is faster than the other, or they would never meet"
    assert got > gain * alone


# ---- seats ------------------------------------------------------------------------------------------------


def test_a_coordinators_seat_is_its_number() -> None:
    assert [seat_of(f"coordinator-{number}") for number in (0, 1, 12)] == [0, 1, 12]
    assert seat_of("") == 0
    assert seat_of("left") != seat_of("right")
    assert seat_of("x" + "9" * 400) == 999_999_999


def test_what_is_usual_is_the_faster_half_of_those_measured() -> None:
    book = TimesBook()
    assert book.usual_s(1, 8) == 0.0
    for name, row_us in (("a", 100), ("b", 120), ("c", 5000), ("d", 9000)):
        times = book.of(ReplicaId(name))
        for rows in (4, 8, 16, 32) * 20:
            times.answered(1, rows, 1000 + row_us * rows, 0, 1.0)
    book.of(ReplicaId("e"))  # was never asked
    found = [book.usual_s(2, 10) for _ in range(100)]
    assert found[-1] == pytest.approx(2e-3 + 120e-6 * 10, rel=0.1), "looked at again after a while"
    alone = TimesBook()
    for name, row_us in (("a", 9000), ("b", 100)):
        for rows in (4, 8, 16, 32) * 20:
            alone.of(ReplicaId(name)).answered(1, rows, 1000 + row_us * rows, 0, 1.0)
    assert alone.usual_s(1, 10) == pytest.approx(2e-3, rel=0.1), "of two the faster one"
