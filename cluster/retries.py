"""Actions that failed are not tried again at once: a pause for each that doubles, and nothing else waits for it.

Pure values, so that a policy can carry them in its state. Running the actions is not done here.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeAlias, TypeVar

from cluster.ids import NodeId
from cluster.policy import Action, Copy, Observation, Policy

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Pauses(Generic[Key]):
    """For each key that failed: failures in a row, and until when it is left alone."""

    base_s: float = 10.0
    cap_s: float = 600.0
    entries: Mapping[Key, tuple[int, float]] = field(default_factory=dict)

    def failed(self, keys: Iterable[Key], now_s: float) -> "Pauses[Key]":
        """After these failed now. Entries whose pause ended longer ago than the cap are forgotten: it stays bounded."""
        kept = {key: entry for key, entry in self.entries.items() if now_s < entry[1] + self.cap_s}
        for key in keys:
            failures = kept.get(key, (0, 0.0))[0] + 1
            pause_s = min(self.cap_s, self.base_s * 2.0 ** min(failures - 1, 60))
            kept[key] = (failures, now_s + pause_s)
        return replace(self, entries=kept)

    def paused(self, now_s: float) -> frozenset[Key]:
        """Keys that are left alone now."""
        return frozenset(key for key, (_, until_s) in self.entries.items() if now_s < until_s)


Placements: TypeAlias = "Pauses[tuple[int, NodeId]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class WithPauses:
    """A policy whose failed copies are not put on the same node again for a while; all else goes on."""

    inner: Policy
    base_s: float = 10.0
    cap_s: float = 600.0

    def __call__(
        self, seen: Observation, state: tuple[Placements, Any] | None
    ) -> tuple[tuple[Action, ...], tuple[Placements, Any]]:
        """One round. The state is the pauses and the inner policy's state."""
        pauses, inner_state = state or (Pauses(self.base_s, self.cap_s), None)
        failed = [(action.unit, action.node_id) for action in seen.failed if isinstance(action, Copy)]
        pauses = pauses.failed(failed, seen.now_s)
        forbidden = seen.forbidden | pauses.paused(seen.now_s)
        actions, inner_state = self.inner(replace(seen, forbidden=forbidden), inner_state)
        return actions, (pauses, inner_state)
