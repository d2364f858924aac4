"""Decisions are timed where there is something to decide; how long they take is not asserted."""

import pytest

from experiments.simulation import decisions
from experiments.simulation.decisions import Shape, measure


def test_every_decision_is_timed_and_moves_something() -> None:
    took = measure(Shape(layers=4, hosts=16, ranges=2), 0, windows=6)
    assert 0 < took.median_ms <= took.most_ms
    assert took.placing_ms > 0
    assert took.num_moves > 0
    again = measure(Shape(layers=4, hosts=16, ranges=2), 0, windows=6)
    assert again.num_moves == took.num_moves


def test_the_command_prints_the_shapes_that_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {"small": Shape(layers=2, hosts=8), "small too": Shape(layers=2, hosts=8, ranges=2), "other": Shape()}
    monkeypatch.setattr(decisions, "SHAPES", shapes)
    decisions.main(["small"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" median")[0].strip() for line in lines] == ["small", "small too"]
