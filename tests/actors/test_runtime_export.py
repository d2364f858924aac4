"""What the runtime's exporter is given: counters grow, series that end are set to nothing, supervisors show it all."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from actors.metrics.family import Family
from actors.metrics.increments import MAX_REMEMBERED, Increments
from actors.metrics.runtime_export import RuntimeExport
from actors.supervision.in_process import InProcessRuntime
from actors.supervision.measured import EXPORT_S, Measured
from actors.supervision.member import View
from tests.support.statuses import status


def exported(*rounds: list[Family]) -> dict[tuple[str, tuple[str, ...]], float]:
    async def work() -> dict[tuple[str, tuple[str, ...]], float]:
        runtime = InProcessRuntime()
        export = RuntimeExport(runtime.metric)
        for families in rounds:
            export.export(families)
        return runtime.metrics

    return asyncio.run(work())


def counter(**values: float) -> Family:
    return Family("c", "counter", "counts", ("of",), {(name,): value for name, value in values.items()})


def gauge(**values: float) -> Family:
    return Family("g", "gauge", "is", ("of",), {(name,): value for name, value in values.items()})


def test_counters_are_given_what_they_have_grown_by() -> None:
    found = exported([counter(a=5, b=1)], [counter(a=7, b=1)], [counter(a=1, c=4)])
    assert found == {("c", ("a",)): 3, ("c", ("c",)): 4}, "from 5 to 7, then from the beginning; b never grew"


def test_a_gauge_whose_series_ends_is_set_to_nothing() -> None:
    assert exported([gauge(a=5, b=1)], [gauge(b=2)], [gauge(b=3)]) == {("g", ("a",)): 0, ("g", ("b",)): 3}


def test_what_was_never_told_is_not_made() -> None:
    made: list[str] = []

    def make(kind: Any, name: str, text: str, labels: tuple[str, ...]) -> Callable[[float, Mapping[str, str]], None]:
        made.append(name)
        return lambda value, tags: None

    RuntimeExport(make).export([gauge(), counter(a=1)])
    assert made == ["c"]


def test_one_that_was_silent_for_a_while_is_not_counted_twice() -> None:
    sums = Increments()
    totals = []
    for values in ({"a": 10, "b": 1}, {"b": 2}, {"a": 11, "b": 2}):
        sums.since_last(values)
        totals.append(sums.total)
    assert totals == [0, 1, 2]


def test_memory_of_those_who_came_and_went_is_bounded() -> None:
    sums = Increments()
    for life in range(MAX_REMEMBERED + 100):
        sums.since_last({life: 1.0})
    assert len(sums._last) == MAX_REMEMBERED
    assert sums.total == MAX_REMEMBERED + 99


def test_a_supervisor_shows_the_cluster_every_few_seconds() -> None:
    async def work() -> None:
        runtime, now = InProcessRuntime(), [0.0]
        measured = Measured(runtime, clock=lambda: now[0])
        info = {"coordinator_id": "coordinator-0", "state": "ready", "num_running": 3, "load": [[1, 2]]}
        views = [
            View("coordinator-0", 1, info),
            View("coordinator-1", 1, info | {"coordinator_id": "coordinator-1"}, dead="it fell"),
            View("coordinator-2", 1, None),
        ]
        running = ("octavo_num_requests_running", ("coordinator-0",))
        measured.tell(status, views)
        assert runtime.metrics[running] == 3
        assert runtime.metrics["octavo_expert_copies_ready", ("0",)] == 1
        assert ("octavo_num_requests_running", ("coordinator-1",)) not in runtime.metrics
        info["num_running"] = 5
        measured.tell(status, views)
        assert runtime.metrics[running] == 3, "not yet"
        now[0] += EXPORT_S
        measured.tell(status, views)
        assert runtime.metrics[running] == 5

    asyncio.run(work())


def test_a_defect_in_metrics_ends_no_round() -> None:
    def broken() -> Any:
        raise ZeroDivisionError

    async def work() -> None:
        Measured(InProcessRuntime()).tell(broken, [])

    asyncio.run(work())
