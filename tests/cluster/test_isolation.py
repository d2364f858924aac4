"""After a step raised: the guilty one is found among many in few steps, and nobody fails by chance."""

import math
from collections.abc import Callable

import pytest

from cluster.ids import SequenceId
from cluster.isolation import Isolation, Suspect
from cluster.sequence import Sequence, SequenceStatus


def sequences(count: int) -> list[Sequence]:
    made = [Sequence(seq_id=SequenceId(number), prompt_ids=[0] * 9, max_tokens=5) for number in range(count)]
    for number, one in enumerate(made):
        one.arrival = number
        one.num_computed = 3
    return made


def suspects(*chosen: Sequence) -> list[Suspect]:
    return [Suspect(one, one.num_computed) for one in chosen]


def play(everybody: list[Sequence], raises: Callable[[list[Sequence]], bool]) -> tuple[list[int], int]:
    """Steps until nobody is under suspicion: the guilty, and how many steps it took."""
    isolation, guilty, steps = Isolation(), [], 1
    assert isolation.raised(suspects(*everybody)) is None
    while (group := isolation.group()) is not None:
        steps += 1
        step = [one for one in everybody if one.seq_id in group]
        if raises(step):
            found = isolation.raised(suspects(*step))
            if found is not None:
                guilty.append(int(found.seq_id))
                found.status = SequenceStatus.FINISHED
        else:
            for one in step:
                one.num_computed += 1
    return guilty, steps


def test_without_trouble_everybody_may_run() -> None:
    assert Isolation().group() is None


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_what_raised_by_chance_fails_nobody(count: int) -> None:
    everybody = sequences(count)
    assert play(everybody, lambda _: False) == ([], min(3, count + 1))
    assert {one.num_computed for one in everybody} == {4}, "each got past the place, once"


@pytest.mark.parametrize("count", [1, 2, 3, 16, 64, 100])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_the_guilty_one_is_found_in_a_few_steps_and_nobody_else(count: int, place: float) -> None:
    everybody = sequences(count)
    bad = everybody[round(place * (count - 1))]
    guilty, steps = play(everybody, lambda step: bad in step)
    assert guilty == [bad.seq_id]
    assert steps <= 2 * math.ceil(math.log2(count)) + 3
    assert all(one.num_computed == 4 for one in everybody if one is not bad)


def test_several_guilty_ones_are_all_found() -> None:
    everybody = sequences(32)
    bad = {3, 4, 31}
    guilty, _ = play(everybody, lambda step: any(one.seq_id in bad for one in step))
    assert guilty == [3, 4, 31]


def test_where_everything_raises_everybody_fails_in_bounded_time() -> None:
    guilty, steps = play(sequences(64), lambda _: True)
    assert sorted(guilty) == list(range(64))
    assert steps <= 3 * 64


def test_company_that_raises_without_anybody_guilty_fails_nobody() -> None:
    guilty, _ = play(sequences(16), lambda step: len(step) > 4)
    assert guilty == []


def test_a_single_sequence_is_not_guilty_before_it_raised_twice_under_suspicion() -> None:
    (one,) = sequences(1)
    isolation = Isolation()
    for _ in range(2):
        assert isolation.raised(suspects(one)) is None
        assert isolation.group() == {one.seq_id}
    assert isolation.raised(suspects(one)) is one
    assert isolation.group() is None


def test_who_has_got_past_the_place_is_no_longer_held_back() -> None:
    """A trial may take several steps: who prefills in small chunks, or starts over, needs them."""
    first, second = sequences(2)
    isolation = Isolation()
    isolation.raised([Suspect(first, 8), Suspect(second, 3)])
    assert isolation.group() == {first.seq_id}
    first.num_computed = 8
    assert isolation.group() == {first.seq_id}, "it stands where the step stood, not past it"
    first.num_computed = 9
    assert isolation.group() == {second.seq_id}
    second.status = SequenceStatus.FINISHED
    assert isolation.group() is None, "who has ended need not be tried"


def test_those_of_a_group_who_did_not_take_part_in_its_step_stay_in_it() -> None:
    everybody = sequences(4)
    isolation = Isolation()
    isolation.raised(suspects(*everybody))
    assert isolation.group() == {0, 1}
    assert isolation.raised(suspects(everybody[1])) is None, "alone by chance: it was not tried alone"
    assert isolation.group() == {1}
    everybody[1].num_computed += 1
    assert isolation.group() == {0}


def test_a_group_that_cannot_run_is_let_go() -> None:
    isolation = Isolation()
    isolation.skip()
    isolation.raised(suspects(*sequences(2)))
    isolation.skip()
    assert isolation.group() == {1}
    isolation.skip()
    assert isolation.group() is None
