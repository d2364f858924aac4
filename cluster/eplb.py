"""EPLB, the baseline: replicate the hottest experts, pack the copies evenly, begin from nothing every time.

Re-implemented from its published description: DeepSeek-AI, DeepSeek-V3 Technical Report, arXiv 2412.19437, §3.4
(redundant experts, chosen by load and rearranged at intervals), and the README of their expert-parallelism load
balancer (the hierarchical policy where groups of experts divide evenly among nodes, the global one elsewhere). As
published it does not look at where experts are, may put two copies on one device, and needs counts that divide. The
policy here keeps the first, which is what it is compared for; it avoids the second where it can, and takes hosts of
unequal size.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.layout import BoolArray, FloatArray, Grain, Host, IntArray, Layout
from cluster.layout_draft import MANY_COPIES, Draft
from cluster.mending import check_copies
from cluster.policy import Action, Observation


def replicate(load_E: FloatArray, num_copies: int, *, floor: int = 1) -> IntArray:
    """Copies of each expert, `num_copies` in all: `floor` each, then one after another where a copy has most to do."""
    if num_copies < floor * len(load_E):
        raise ValueError(f"num_copies is {num_copies}, but there are {len(load_E)} experts of at least {floor}")
    copies = np.full(len(load_E), floor, np.int64)
    heap = [(-float(load) / floor, expert) for expert, load in enumerate(load_E)]
    heapq.heapify(heap)
    for _ in range(num_copies - floor * len(load_E)):
        _, expert = heap[0]
        copies[expert] += 1
        heapq.heapreplace(heap, (-float(load_E[expert]) / int(copies[expert]), expert))
    return copies


def pack(weights: Sequence[float], capacities: Sequence[int], kinds: Sequence[int] | None = None) -> list[int]:
    """A pack for each item: the heaviest first, each to the lightest pack that has room (balanced packing).

    `capacities`: items that each pack takes. With `kinds`, two items of one kind share a pack only where no other has
    room. Raises ValueError when the items do not fit.
    """
    if len(weights) > sum(capacities):
        raise ValueError(f"{len(weights)} items do not fit into capacities {list(capacities)}")
    room = list(capacities)
    weight = [0.0] * len(room)
    inside: list[set[int]] = [set() for _ in room]
    chosen = [0] * len(weights)
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        kind = item if kinds is None else kinds[item]
        able = [p for p in range(len(room)) if room[p]]
        best = min(able, key=lambda p: (kind in inside[p], weight[p], p))
        chosen[item] = best
        room[best] -= 1
        weight[best] += weights[item]
        inside[best].add(kind)
    return chosen


def hierarchical(
    load_E: FloatArray, *, num_groups: int, num_nodes: int, num_devices: int, num_copies: int
) -> list[list[int]]:
    """Experts of each device: groups packed onto nodes, experts replicated in each, copies packed onto its devices.

    As published, all of these must divide: experts into groups, groups, devices and copies into nodes, copies into
    devices. With one group and one node it is the published global policy.
    """
    divisions = {
        "num_groups into experts": (len(load_E), num_groups),
        "num_nodes into groups": (num_groups, num_nodes),
        "num_nodes into devices": (num_devices, num_nodes),
        "num_devices into copies": (num_copies, num_devices),
    }
    for name, (whole, parts) in divisions.items():
        if parts < 1 or whole % parts:
            raise ValueError(f"{name}: {parts} does not divide {whole}")
    groups = np.arange(len(load_E)).reshape(num_groups, -1)
    node_of_group = pack([float(load_E[g].sum()) for g in groups], [num_groups // num_nodes] * num_nodes)
    per_node, per_device = num_devices // num_nodes, num_copies // num_devices
    devices: list[list[int]] = []
    for node in range(num_nodes):
        experts = np.concatenate([groups[g] for g in range(num_groups) if node_of_group[g] == node])
        copies = replicate(load_E[experts], num_copies // num_nodes)
        items = np.repeat(experts, copies)
        weights = np.repeat(load_E[experts] / copies, copies)
        chosen = pack(weights.tolist(), [per_device] * per_node)
        devices += [[int(items[i]) for i in range(len(items)) if chosen[i] == d] for d in range(per_node)]
    return devices


@dataclass(frozen=True, slots=True)
class EplbState:
    """When the experts were rearranged last, in seconds of the observations' clock."""

    rearranged_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Eplb:
    """The policy: every `interval_s`, the global placement of the current load, on the slots that there are.

    With one copy of each at least, as published, unless `min_copies` says more, and at most `max_copies`.
    """

    interval_s: float = 60.0
    min_copies: int = 1
    max_copies: int = MANY_COPIES

    def __post_init__(self) -> None:
        check_copies(self.min_copies, self.max_copies)

    def __call__(self, seen: Observation, state: EplbState | None) -> tuple[tuple[Action, ...], EplbState]:
        """Actions from the present layout to the new one, as `transition` orders them."""
        lost = bool((seen.layout.copies_U == 0).any())
        if state is not None and seen.now_s - state.rearranged_s < self.interval_s and not lost:
            return (), state
        placed = place_globally(seen, floor=self.min_copies, most=self.max_copies)
        return transition(seen.layout, placed, "EPLB rearranges all experts"), EplbState(seen.now_s)


def place_globally(seen: Observation, *, floor: int = 1, most: int = MANY_COPIES) -> Layout:
    """Each layer range placed on its own (with whole columns: all at once), as EPLB does with layers.

    Every unit gets `floor` copies (1 as published) where its range has the slots, and at most `most`.

    The slots of the hosts are dealt to the ranges in turn, so that each range gets as many as any other. Work is
    compared by a range's sum over its layers. A copy that fits only beside another copy of its unit is left out.
    """
    grain, hosts = seen.layout.grain, seen.layout.hosts
    held = np.zeros((grain.num_units, len(hosts)), np.bool_)
    capacity_GN = _capacities(grain, hosts)
    for which in range(grain.num_ranges):
        units = slice(which * grain.num_experts, (which + 1) * grain.num_experts)
        load_E = seen.work_LE[grain.layers(units.start)].sum(axis=0)
        _pack_range(held[units], load_E, capacity_GN[which], floor, most)
    return Layout(grain, hosts, held)


def _capacities(grain: Grain, hosts: Sequence[Host]) -> IntArray:
    """Slots that each range has on each host, shape (G, N)."""
    capacity = np.zeros((grain.num_ranges, len(hosts)), np.int64)
    largest = int(grain.bytes_U.max())
    dealt = 0
    for column, host in enumerate(hosts):
        slots = 0 if host.draining else min(host.slots, host.memory_bytes // largest, grain.num_units)
        np.add.at(capacity[:, column], (dealt + np.arange(slots)) % grain.num_ranges, 1)
        dealt += slots
    return capacity


def _pack_range(held_EN: BoolArray, load_E: FloatArray, capacity_N: IntArray, floor: int, most: int) -> None:
    total = int(capacity_N.sum())
    if total < len(load_E):
        raise ValueError(f"{len(load_E)} experts do not fit into {total} slots")
    floor = floor if total >= floor * len(load_E) else 1
    copies = np.minimum(replicate(load_E, total, floor=floor), max(int((capacity_N > 0).sum()), 1))
    copies = np.minimum(copies, most)
    items = np.repeat(np.arange(len(load_E)), copies)
    weights = np.repeat(load_E / copies, copies)
    chosen = pack(weights.tolist(), capacity_N.tolist(), items.tolist())
    held_EN[items, chosen] = True


def transition(before: Layout, after: Layout, why: str) -> tuple[Action, ...]:
    """Actions from one layout to the other, in an order in which slots suffice and what was served stays served.

    Where that would need a slot that nobody has, the copy that cannot be made is left out and the old one kept.
    """
    draft = Draft(before, None)
    wanted = {(int(u), int(n)) for u, n in np.argwhere(after.held_UN & ~before.held_UN)}
    surplus = {(int(u), int(n)) for u, n in np.argwhere(before.held_UN & ~after.held_UN)}
    actions: list[Action] = []
    num_done = -1
    while num_done < len(actions):
        num_done = len(actions)
        for unit, host in sorted(surplus, key=lambda pair: (-int(draft.copies_U[pair[0]]), pair)):
            if draft.copies_U[unit] > 1:
                surplus.remove((unit, host))
                actions.append(draft.drop(unit, host, why))
        for unit, host in sorted(wanted, key=lambda pair: (int(draft.copies_U[pair[0]]), pair)):
            if draft.has_room(unit, host):
                wanted.remove((unit, host))
                actions.append(draft.copy(unit, host, why))
    return tuple(actions)
