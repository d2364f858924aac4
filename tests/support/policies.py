"""Balancing policies for tests, named in a configuration as `tests.support.policies:NAME`. Each is a pure function."""

import threading
from typing import Any

from cluster.layout import Layout
from cluster.policy import Action, AddHosts, Copy, Drop, Observation


def copy_the_first(seen: Observation, state: Any) -> tuple[tuple[Action, ...], Any]:
    """One more copy of unit 0 wherever there is room, once; it tells in its state what had failed."""
    layout = seen.layout
    free = [n for n in range(len(layout.hosts)) if not layout.held_UN[0, n] and layout.slots_free_N[n] > 0]
    if state is not None or not free:
        return (), (state or ()) + seen.failed
    return (_copy(layout, 0, free[0]),), ()


def move_the_first(seen: Observation, state: Any) -> tuple[tuple[Action, ...], Any]:
    """Unit 0 from where it is to where it is not, once."""
    copies, _ = copy_the_first(seen, state)
    if not copies:
        return (), state or ()
    column = int(seen.layout.held_UN[0].argmax())
    gone = Drop(unit=0, node_id=seen.layout.hosts[column].node_id, reason="it has moved")
    return (*copies, gone), ()


def copy_three_to_two_nodes(seen: Observation, state: Any) -> tuple[tuple[Action, ...], Any]:
    """Units 0 and 2 to one node, unit 1 to another, once."""
    if state is not None:
        return (), state
    layout = seen.layout
    first, second = next(
        (a, b)
        for a in range(len(layout.hosts))
        for b in range(len(layout.hosts))
        if a != b and not layout.held_UN[[0, 2], a].any() and not layout.held_UN[1, b]
    )
    return tuple(_copy(layout, unit, column) for unit, column in ((0, first), (1, second), (2, first))), ()


def move_one_and_copy_another(seen: Observation, state: Any) -> tuple[tuple[Action, ...], Any]:
    """Unit 0 to another node, and unit 1 to a third one, once."""
    if state is not None:
        return (), state
    layout = seen.layout
    home = int(layout.held_UN[0].argmax())
    first, second = next(
        (a, b)
        for a in range(len(layout.hosts))
        for b in range(len(layout.hosts))
        if len({home, a, b}) == 3 and not layout.held_UN[0, a] and not layout.held_UN[1, b]
    )
    gone = Drop(unit=0, node_id=layout.hosts[home].node_id, reason="it has moved")
    return (_copy(layout, 0, first), gone, _copy(layout, 1, second)), ()


def _copy(layout: Layout, unit: int, column: int) -> Copy:
    size = int(layout.grain.bytes_U[unit])
    return Copy(unit=unit, node_id=layout.hosts[column].node_id, source=None, num_bytes=size, reason="a test wants it")


def drop_the_last(seen: Observation, state: Any) -> tuple[tuple[Action, ...], Any]:
    """What no policy may: the only copy of unit 0 goes."""
    (host, *_) = [n for n in range(len(seen.layout.hosts)) if seen.layout.held_UN[0, n]]
    return (Drop(unit=0, node_id=seen.layout.hosts[host].node_id, reason="nobody knows"),), state


def ask_for_hosts(seen: Observation, state: Any) -> tuple[tuple[Action, ...], Any]:
    """One more host, every time; the state has what failed."""
    return (AddHosts(num=1, reason="more is more"),), (state or ()) + seen.failed


def raise_an_error(seen: Observation, state: Any) -> Any:
    """Always."""
    raise ZeroDivisionError("the policy's own mistake")


def talk_nonsense(seen: Observation, state: Any) -> Any:
    """A text instead of actions."""
    return "copy everything everywhere", state


THOUGHT = threading.Event()
"""Ends what `think_long` does."""


def think_long(seen: Observation, state: Any) -> Any:
    """Until it is told that it has thought enough."""
    assert THOUGHT.wait(200)
    return (), state


not_a_function = 3
