"""What a policy answers, held to its form and to the rules that no policy may break.

A policy may be anybody's function. An answer that is no answer is refused as a whole; one that goes too far is cut
where it does, since actions are done in their order.
"""

from collections.abc import Iterable
from typing import Any

from cluster.layout import Layout
from cluster.policy import Action, AddHosts, Copy, DrainHost, Drop, KeepHost, RemoveHost

MAX_ACTIONS = 1024
MAX_HOSTS_AT_ONCE = 1024
_KINDS = (Copy, Drop, AddHosts, DrainHost, KeepHost, RemoveHost)


class BadAnswer(ValueError):
    """What a policy returned is not what policies return. Names it."""


def checked(answer: Any, layout: Layout) -> tuple[tuple[Action, ...], Any]:
    """The actions and the state in a policy's answer, if they are that. Raises BadAnswer."""
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[0], tuple | list):
        raise BadAnswer(f"it returned {_shown(answer)}, expected (actions, state)")
    actions, state = answer
    if len(actions) > MAX_ACTIONS:
        raise BadAnswer(f"it wants {len(actions)} actions at once, at most {MAX_ACTIONS} are taken")
    nodes = {host.node_id for host in layout.hosts}
    for action in actions:
        if not isinstance(action, _KINDS):
            raise BadAnswer(f"{_shown(action)} is no action")
        if not isinstance(action.reason, str):
            raise BadAnswer(f"the reason of {_shown(action)} is no text")
        if isinstance(action, AddHosts):
            if type(action.num) is not int or not 1 <= action.num <= MAX_HOSTS_AT_ONCE:
                raise BadAnswer(f"it asks for {action.num!r} hosts, expected 1 to {MAX_HOSTS_AT_ONCE}")
        elif action.node_id not in nodes:
            raise BadAnswer(f"there is no node {_shown(action.node_id)}")
        if isinstance(action, Copy | Drop) and not _is_unit(action.unit, layout):
            raise BadAnswer(f"there is no unit {_shown(action.unit)}: there are {layout.grain.num_units}")
    return tuple(actions), state


def within_bounds(
    actions: Iterable[Action], layout: Layout, *, budget_bytes: int, min_copies: int
) -> tuple[Action, ...]:
    """The actions up to the first that would load more than the budget, or leave a unit fewer than `min_copies` nodes.

    The first copy is made whatever it weighs, and so is that of a unit that nobody holds.
    """
    copies = layout.copies_U.copy()
    loaded = 0
    kept: list[Action] = []
    for action in actions:
        if isinstance(action, Copy):
            size = int(layout.grain.bytes_U[action.unit])
            if copies[action.unit] and loaded and loaded + size > budget_bytes:
                break
            loaded += size
            copies[action.unit] += 1
        elif isinstance(action, Drop):
            if copies[action.unit] - 1 < min_copies:
                break
            copies[action.unit] -= 1
        kept.append(action)
    return tuple(kept)


def _is_unit(unit: object, layout: Layout) -> bool:
    return isinstance(unit, int) and not isinstance(unit, bool) and 0 <= unit < layout.grain.num_units


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
