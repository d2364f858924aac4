"""Layouts for tests of the balancing policies: made from plain numbers, and changed under watch."""

from collections.abc import Iterable, Sequence

import numpy as np

from cluster.ids import NodeId
from cluster.layout import FloatArray, Grain, Host, Layout
from cluster.mending import copies_floor
from cluster.policy import Action, Copy, Drop, Observation, Policy, apply, moved_bytes


def hosts(num: int, slots: int | Sequence[int] = 1, *, memory: int = 1 << 40) -> tuple[Host, ...]:
    each = [slots] * num if isinstance(slots, int) else list(slots)
    return tuple(Host(node_id=NodeId(f"n{i}"), slots=each[i], memory_bytes=memory) for i in range(num))


def layout(grain: Grain, on: Sequence[Host], held: Iterable[tuple[int, int]] = ()) -> Layout:
    """With the (unit, host) pairs held."""
    held_UN = np.zeros((grain.num_units, len(on)), np.bool_)
    for unit, host in held:
        held_UN[unit, host] = True
    return Layout(grain, tuple(on), held_UN)


def watched(before: Layout, actions: Iterable[Action]) -> Layout:
    """`apply`, one action after another, with every rule checked after each."""
    now = before
    names = [host.node_id for host in before.hosts]
    over = (np.minimum(before.slots_free_N, 0), np.minimum(before.bytes_free_N, 0))
    for action in actions:
        if not isinstance(action, Copy | Drop):
            continue
        column = names.index(action.node_id)
        assert action.reason
        if isinstance(action, Copy):
            assert not now.held_UN[action.unit, column], f"second copy on a node: {action}"
            assert not now.hosts[column].draining, f"to a draining host: {action}"
            if action.source is None:
                assert now.copies_U[action.unit] == 0, f"from disk though somebody has it: {action}"
            else:
                assert now.held_UN[action.unit, names.index(action.source)], f"from one that has it not: {action}"
        else:
            assert now.held_UN[action.unit, column], f"drops what is not there: {action}"
        after = apply(now, [action])
        assert (after.slots_free_N >= over[0]).all(), f"slots: {action}"
        assert (after.bytes_free_N >= over[1]).all(), f"memory: {action}"
        assert ((after.copies_U > 0) >= (now.copies_U > 0)).all(), f"unserved: {action}"
        now = after
    return now


def settle(policy: Policy, start: Layout, work_LE: FloatArray, *, rounds: int = 60) -> tuple[Layout, object, int]:
    """Runs the policy on a load that stays until it does nothing twice: the layout, its state, the bytes moved."""
    now, state, num_bytes, quiet = start, None, 0, 0
    for step in range(rounds):
        actions, state = policy(Observation(now_s=60.0 * step, layout=now, work_LE=work_LE), state)
        now = watched(now, actions)
        num_bytes += moved_bytes(actions)
        quiet = 0 if actions else quiet + 1
        if quiet == 2:
            return now, state, num_bytes
    raise AssertionError(f"still moving after {rounds} rounds: {actions}")


def within(start: Layout, num_loads: int) -> list[Layout]:
    """Every layout that respects the rules and needs at most so many loads."""
    if num_loads < 0:
        return []
    found: list[Layout] = []
    floor, slots = copies_floor(start), [host.slots for host in start.hosts]
    frontier, seen = [start.held_UN], {start.held_UN.tobytes()}
    for depth in range(num_loads + 1):
        for held in frontier:
            found += [Layout(start.grain, start.hosts, kept) for kept in _pruned(held, slots, floor)]
        if depth == num_loads:
            break
        grown = []
        for held in frontier:
            for unit, host in np.argwhere(~held):
                more = held.copy()
                more[unit, host] = True
                if more.tobytes() not in seen:
                    seen.add(more.tobytes())
                    grown.append(more)
        frontier = grown
    return found


def _pruned(held: np.ndarray, slots: list[int], floor: int) -> list[np.ndarray]:
    """Ways to drop what hosts have too much, each unit keeping the floor."""
    over = held.sum(axis=0) - slots
    if (over <= 0).all():
        return [held]
    host = int(np.argmax(over))
    ways = []
    for unit in np.flatnonzero(held[:, host] & (held.sum(axis=1) > floor)):
        less = held.copy()
        less[unit, host] = False
        ways += _pruned(less, slots, floor)
    return ways
