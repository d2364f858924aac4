"""Each size of step is tried every way, the fastest is kept, and the others are tried again now and then."""

from collections import Counter
from collections.abc import Mapping

import pytest

from cluster.microbatching import MicrobatchChooser, MicrobatchPolicy

POLICY = MicrobatchPolicy(choices=(1, 2, 3), min_tokens=8, samples=3, probe_every=20)


def drive(chooser: MicrobatchChooser, tokens: int, seconds: Mapping[int, float], steps: int) -> list[int]:
    """What is chosen in so many steps, each of which takes what its choice costs."""
    chosen = []
    for _ in range(steps):
        choice = chooser.choose(tokens)
        chooser.observe(tokens, choice, seconds[choice])
        chosen.append(choice)
    return chosen


def test_every_choice_is_measured_before_one_is_preferred() -> None:
    chosen = drive(MicrobatchChooser(POLICY), 32, {1: 3.0, 2: 1.0, 3: 2.0}, 9)
    assert Counter(chosen) == {1: 3, 2: 3, 3: 3}


def test_the_fastest_is_kept_and_the_others_are_probed() -> None:
    chooser = MicrobatchChooser(POLICY)
    drive(chooser, 32, {1: 3.0, 2: 1.0, 3: 2.0}, 9)
    chosen = Counter(drive(chooser, 32, {1: 3.0, 2: 1.0, 3: 2.0}, 200))
    assert chosen[2] == 190
    assert chosen[1] + chosen[3] == 10
    assert min(chosen[1], chosen[3]) >= 4
    assert chooser.preferred() == {64: 2}


def test_it_changes_its_mind_when_the_world_does() -> None:
    chooser = MicrobatchChooser(POLICY)
    drive(chooser, 32, {1: 1.0, 2: 2.0, 3: 3.0}, 30)
    drive(chooser, 32, {1: 9.0, 2: 2.0, 3: 3.0}, 30)
    assert chooser.preferred() == {64: 2}


def test_one_slow_step_changes_nothing() -> None:
    chooser = MicrobatchChooser(POLICY)
    drive(chooser, 32, {1: 1.0, 2: 2.0, 3: 3.0}, 30)
    chooser.observe(32, 1, 50.0)
    assert chooser.preferred() == {64: 1}


def test_sizes_are_learnt_apart() -> None:
    chooser = MicrobatchChooser(POLICY)
    for _ in range(20):
        drive(chooser, 16, {1: 1.0, 2: 2.0, 3: 3.0}, 1)
        drive(chooser, 500, {1: 9.0, 2: 5.0, 3: 7.0}, 1)
    assert chooser.preferred() == {32: 1, 512: 2}


def test_small_steps_stay_whole_and_a_single_choice_is_obeyed() -> None:
    assert MicrobatchChooser(POLICY).choose(7) == 1
    fixed = MicrobatchChooser(MicrobatchPolicy(choices=(2,), min_tokens=2))
    assert [fixed.choose(tokens) for tokens in (1, 2, 900)] == [1, 2, 2]


@pytest.mark.parametrize("bad", [{"choices": ()}, {"choices": (0, 1)}, {"samples": 0}, {"probe_every": 0}])
def test_a_policy_without_sense_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="positive numbers"):
        MicrobatchPolicy(**bad)  # type: ignore[arg-type]
