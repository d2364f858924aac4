"""What is no answer is refused by name; what goes too far is cut there."""

from typing import Any

import pytest

from cluster.ids import NodeId
from cluster.layout import Grain
from cluster.policy import AddHosts, Copy, DrainHost, Drop
from cluster.policy_check import MAX_ACTIONS, BadAnswer, checked, within_bounds
from tests.support.layouts import hosts, layout

GRAIN = Grain.even(4, 3, layer_bytes=10)
HERE = layout(GRAIN, hosts(3, 2), [(0, 0), (1, 0), (2, 1)])


def copy(unit: Any, node: str = "n2", **more: Any) -> Copy:
    return Copy(**{"unit": unit, "node_id": NodeId(node), "source": None, "num_bytes": 40, "reason": "so", **more})


def drop(unit: int, node: str = "n0") -> Drop:
    return Drop(unit=unit, node_id=NodeId(node), reason="so")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, r"it returned None, expected \(actions, state\)"),
        (("text", 1), "it returned"),
        (((), 1, 2), "it returned"),
        ((("copy",), None), "'copy' is no action"),
        (((copy(3),), None), "there is no unit 3: there are 3"),
        (((copy(-1),), None), "there is no unit -1"),
        (((copy(True),), None), "there is no unit True"),
        (((copy(0, "n9"),), None), "there is no node 'n9'"),
        (((copy(0, reason=7),), None), "the reason of Copy"),
        (((AddHosts(num=0, reason=""),), None), "it asks for 0 hosts"),
        (((AddHosts(num=10**9, reason=""),), None), "it asks for 1000000000 hosts"),
        (((DrainHost(node_id=NodeId("x"), reason=""),), None), "there is no node 'x'"),
        (((drop(0),) * (MAX_ACTIONS + 1), None), "at most 1024"),
    ],
)
def test_nonsense_is_named(answer: Any, words: str) -> None:
    with pytest.raises(BadAnswer, match=words):
        checked(answer, HERE)


def test_an_answer_is_taken_as_it_is() -> None:
    actions = [copy(0), drop(0), AddHosts(num=2, reason="")]
    assert checked((actions, "state"), HERE) == (tuple(actions), "state")
    assert checked(((), None), HERE) == ((), None)


def test_what_goes_beyond_the_budget_or_below_the_minimum_is_cut_off() -> None:
    def kept(*actions: Any, budget: int = 80, least: int = 1) -> int:
        return len(within_bounds(actions, HERE, budget_bytes=budget, min_copies=least))

    assert kept(copy(0), copy(1), copy(2), drop(0)) == 2
    assert kept(copy(0), budget=1) == 1, "the first is made whatever it weighs"
    assert kept(drop(0), copy(1)) == 0, "the last one stays, and what was to follow is left, too"
    assert kept(copy(0), drop(0)) == 2
    assert kept(copy(0), drop(0), least=2) == 1
    empty = layout(GRAIN, hosts(3, 2))
    assert len(within_bounds([copy(0), copy(1), copy(2)], empty, budget_bytes=40, min_copies=1)) == 3, "nobody has them"
