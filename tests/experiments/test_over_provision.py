"""A day of Azure's requests with hosts that follow it, beside the cheapest fixed number that is as quick."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments.simulation.over_provision import AS_GOOD, P99, Day, compare, fixed, load, run, smallest

QUICK = Day(
    rate=0.25,
    duration_s=400,
    layers=1,
    call_s=24e-3,
    token_s=16e-3,
    step_s=0.06,
    host_start_s=20.0,
    min_hosts=2,
    max_hosts=12,
    layer_bytes=10**9,
)
"""Long steps, so that a day has few."""


def azure(path: Path) -> Path:
    """A trace in Azure's format: a request every 4 s, now and then a long one."""
    rows = [
        f"2023-11-16 18:{at // 60:02}:{at % 60:02}.0000000,{1500 if at % 28 == 0 else 200},{40}"
        for at in range(0, 3600, 4)
        if at // 60 < 60
    ]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize("first", [None, 2, 9, 99])
@pytest.mark.parametrize("enough", [1, 2, 7, 16, 99])
def test_the_smallest_that_is_enough_is_found(enough: int, first: int | None) -> None:
    asked: list[int] = []

    def is_enough(num: int) -> bool:
        asked.append(num)
        return num >= enough

    assert smallest(2, 16, is_enough, first) == min(max(enough, 2), 16)
    assert len(asked) <= 8
    assert len(set(asked)) == len(asked)
    assert all(2 <= num < 16 for num in asked)


def test_following_hosts_are_compared_with_a_fixed_number_as_quick(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    found = compare(azure(tmp_path / "day.csv"), QUICK, 0, told.append)
    following, *fixed = told
    assert following["hosts"] == "following"
    as_quick = {one["hosts"]: all(one[name] <= AS_GOOD * following[name] for name in P99) for one in fixed}
    assert as_quick[found["fixed_hosts"]]
    assert not any(ok for num, ok in as_quick.items() if num < found["fixed_hosts"])
    (same,) = (one for one in fixed if one["hosts"] == found["fixed_hosts"])
    assert found["saved"] == pytest.approx(1 - following["host_seconds"] / same["host_seconds"])
    assert following["completed"] == same["completed"] > 30


def test_it_is_one_command(tmp_path: Path) -> None:
    import typer

    from experiments.simulation.over_provision import main

    app = typer.Typer()
    app.command()(main)
    arguments = [str(azure(tmp_path / "day.csv")), "--rate", "0.2", "--duration-s", "60", "--slow", "2"]
    arguments += ["--scale", "1", "--scale", "2", "--columns", "4"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    found = [line for line in lines if line["type"] == "over-provision"]
    assert [(line["scale"], line["columns"]) for line in found] == [(1, 4.0), (2, 4.0)]
    assert found[-1] == lines[-1]
    assert {line["type"] for line in lines} == {"run", "over-provision"}


def test_a_scaled_day_has_as_many_more_requests_and_coordinators_and_a_slow_one_fewer_and_longer_steps(
    tmp_path: Path,
) -> None:
    path = azure(tmp_path / "day.csv")
    plain, scaled, slow = (replace(QUICK, rate=0.15, **change) for change in ({}, {"scale": 3}, {"slow": 2.0}))
    traces = [load(path, day, 0) for day in (plain, scaled, slow)]
    assert len(traces[1].arrival_s) == pytest.approx(3 * len(traces[0].arrival_s), rel=0.3)
    assert len(traces[2].arrival_s) == pytest.approx(len(traces[0].arrival_s) / 2, rel=0.3)
    runs = [
        run(trace, day, 8 * day.scale, fixed(day)) for trace, day in zip(traces, (plain, scaled, slow), strict=True)
    ]
    # As many coordinators more and as many hosts: about as quick. Twice as slow steps: answers take twice as long.
    medians = [float(np.median(one.tpot_s)) for one in runs]
    assert medians[1] < 1.5 * medians[0] < medians[2] < 3 * medians[0]
