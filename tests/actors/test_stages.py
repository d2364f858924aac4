"""Seconds by stage, in order of beginning, whatever overlaps or raises."""

import pytest

from actors.command.stages import Stages


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_stages_are_counted_in_the_order_in_which_they_began() -> None:
    clock = Clock()
    stages = Stages(clock)
    with stages.stage("Ray"):
        clock.now += 2
    with stages.stage("HTTP"):
        clock.now += 1
        with stages.stage("experts"):
            clock.now += 4
    assert str(stages) == "Ray 2.0 s, HTTP 5.0 s, experts 4.0 s"
    assert stages.total_s == 7


def test_a_stage_that_raises_is_counted_and_one_name_adds_up() -> None:
    clock = Clock()
    stages = Stages(clock)

    def fail() -> None:
        with stages.stage("Ray"):
            clock.now += 1.5
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
    assert str(stages) == "Ray 3.0 s"
