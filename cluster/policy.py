"""The plug-in seam of balancing and scaling: what a policy is shown, and what it may answer.

A policy is a pure function `(observation, state) -> (actions, state)`: asking it is a dry run, its actions say why.
The state is the policy's own; it is None at the first call, and whoever runs the policy only hands it on. Actions on
the same unit or the same node are done in their order, others side by side (`waits_for`): when one fails, those that
have not begun are left undone, and the policy is asked again.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from cluster.ids import NodeId
from cluster.layout import FloatArray, Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Load a unit on a node, from the node that is named or from disk; then let it serve."""

    unit: int
    node_id: NodeId
    source: NodeId | None
    num_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Take a unit from a node, after it has answered what it has."""

    unit: int
    node_id: NodeId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AddHosts:
    """Ask for so many more hosts."""

    num: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainHost:
    """Show this host as draining from now on."""

    node_id: NodeId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepHost:
    """Show this host as draining no longer."""

    node_id: NodeId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveHost:
    """Give back a host that holds nothing any more."""

    node_id: NodeId
    reason: str


Action: TypeAlias = Copy | Drop | AddHosts | DrainHost | KeepHost | RemoveHost


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What is known at `now_s`, of any clock that does not step back.

    `layout` is what is there now, on the hosts that are there now; a policy is asked again only when its earlier
    actions are done or have failed. `work_LE`: seconds of a host of speed 1 per second, by layer and expert
    (`service_time.busy_seconds` of a window over its length). Parts of it, all of it where that is not known:
    `growing_LE` grows with tokens (b · tokens, without a · calls); `divisible_LE` is what of that comes in batches so
    large that an expert's replicas share them. The rest one replica does, whichever, for each of the `batches` that are
    at the experts at a time. `steps_per_s` and `step_s`: the coordinator's steps in the window and how long one took, 0
    where that is not known. `queue_s`: how long the oldest request waits to be begun. `failed`: actions that have
    failed since the last observation. `forbidden`: (unit, node) pairs on which no copy may be put now.
    """

    now_s: float
    layout: Layout
    work_LE: FloatArray
    growing_LE: FloatArray | None = None
    divisible_LE: FloatArray | None = None
    batches: float = 1.0
    steps_per_s: float = 0.0
    step_s: float = 0.0
    queue_s: float = 0.0
    failed: tuple[Action, ...] = ()
    forbidden: frozenset[tuple[int, NodeId]] = frozenset()

    def __post_init__(self) -> None:
        grain = self.layout.grain
        shape = (grain.num_layers, grain.num_experts)
        if self.work_LE.shape != shape or not np.isfinite(self.work_LE).all() or (self.work_LE < 0).any():
            raise ValueError(f"work_LE has shape {self.work_LE.shape}; it must be {shape}, finite, nowhere negative")
        most_LE = self.work_LE * (1 + 1e-9) + 1e-12  # rounding is no contradiction
        for name in ("growing_LE", "divisible_LE"):
            part = getattr(self, name)
            if part is not None and not (part.shape == shape and (part >= 0).all() and (part <= most_LE).all()):
                raise ValueError(f"{name} has shape {part.shape}; it must be {shape}, a part of work_LE")
        if not 1 <= self.batches < np.inf:
            raise ValueError(f"batches is {self.batches}, but it must be at least 1 and finite")

    @property
    def growing(self) -> FloatArray:
        """`growing_LE`, or all work."""
        return self.work_LE if self.growing_LE is None else self.growing_LE


Policy: TypeAlias = Callable[[Observation, Any], tuple[tuple[Action, ...], Any]]


def apply(layout: Layout, actions: Iterable[Action]) -> Layout:
    """The layout once the copies and drops among the actions are done; others change no layout."""
    columns = {host.node_id: column for column, host in enumerate(layout.hosts)}
    held = layout.held_UN.copy()
    for action in actions:
        if isinstance(action, Copy):
            held[action.unit, columns[action.node_id]] = True
        elif isinstance(action, Drop):
            held[action.unit, columns[action.node_id]] = False
    return Layout(layout.grain, layout.hosts, held)


def waits_for(actions: Iterable[Action]) -> tuple[frozenset[int], ...]:
    """For each action, which of those before it must be done first; all others may be done side by side.

    Those of the same unit, since who drops a copy counts on the others, and those of the same node, since there is room
    for one by what another gave up, and a node loads one after the other. What asks for hosts waits for everything, and
    everything for it. Only the last ones are named, which have waited for the others.
    """
    found: list[frozenset[int]] = []
    last: dict[int | NodeId, int] = {}
    everything: set[int] = set()
    barrier = frozenset[int]()
    for place, action in enumerate(actions):
        if isinstance(action, Copy | Drop):
            found.append(barrier.union(last[key] for key in (action.unit, action.node_id) if key in last))
            last.update({action.unit: place, action.node_id: place})
            everything.add(place)
        else:
            found.append(barrier.union(everything))
            barrier, last, everything = frozenset({place}), {}, set()
    return tuple(found)


def moved_bytes(actions: Iterable[Action]) -> int:
    """Bytes that the copies among the actions load."""
    return sum(action.num_bytes for action in actions if isinstance(action, Copy))
