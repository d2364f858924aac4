"""Two simple policies to compare with: one that moves nothing, and one that follows thresholds expert by expert.

Both keep every unit served. Letters as in `layout`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cluster.eplb import place_globally, transition
from cluster.layout_draft import MANY_COPIES, Draft
from cluster.mending import Allowance, Moves, check_copies, copies_floor, copies_wanted, mend, trim
from cluster.policy import Action, Observation


def static(seen: Observation, state: None) -> tuple[tuple[Action, ...], None]:
    """Places once, evenly whatever the load, and then only what redundancy asks for."""
    if not seen.layout.held_UN.any():
        even = Observation(now_s=seen.now_s, layout=seen.layout, work_LE=np.ones_like(seen.work_LE))
        return transition(seen.layout, place_globally(even), "nothing is placed yet"), state
    draft = Draft(seen.layout, seen.work_LE)
    total = int(seen.layout.grain.bytes_U.sum())
    return tuple(mend(draft, copies_floor(seen.layout), Allowance(2 * total, seen.forbidden))), state


@dataclass(frozen=True, slots=True)
class ReactiveState:
    """When each unit's copies were changed last; units that never were are absent."""

    changed_s: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reactive:
    """A copy more where the copies of a unit work too long, one less where they have little to do.

    Too long is above `high_share` of a host's time, little below `low_share`.

    At most one change of a unit in `cooldown_s`, `budget_bytes` in a round. `low_share` is of what would be left
    for the others after the drop, so that a drop does not bring its copy back. A unit has `min_copies` to `max_copies`.
    """

    budget_bytes: int
    high_share: float = 0.3
    low_share: float = 0.1
    cooldown_s: float = 30.0
    min_copies: int = 1
    max_copies: int = MANY_COPIES

    def __post_init__(self) -> None:
        if not 0 <= self.low_share < self.high_share:
            raise ValueError(f"low_share is {self.low_share}, but it must be below high_share {self.high_share}")
        check_copies(self.min_copies, self.max_copies)
        if self.budget_bytes < 1:
            raise ValueError(f"budget_bytes is {self.budget_bytes}, but it must be at least 1")

    def __call__(self, seen: Observation, state: ReactiveState | None) -> tuple[tuple[Action, ...], ReactiveState]:
        """One round."""
        draft = Draft(seen.layout, seen.work_LE)
        floor = copies_floor(seen.layout, copies_wanted(self.min_copies, self.max_copies))
        allowance = Allowance(self.budget_bytes, seen.forbidden)
        moves = mend(draft, floor, allowance) + trim(draft, self.max_copies)
        changed = dict((state or ReactiveState()).changed_s)
        for unit in range(seen.layout.grain.num_units):
            if seen.now_s - changed.get(unit, -np.inf) < self.cooldown_s:
                continue
            done = self._change(draft, unit, floor, allowance)
            if done:
                changed[unit] = seen.now_s
                moves += done
        return tuple(moves), ReactiveState(changed)

    def _change(self, draft: Draft, unit: int, floor: int, allowance: Allowance) -> Moves:
        copies = int(draft.copies_U[unit])
        work = float(draft.work(unit).sum())
        name, size = draft.grain.say(unit), int(draft.grain.bytes_U[unit])
        if copies and work / copies > self.high_share and copies < self.max_copies and size <= allowance.bytes_left:
            hosts = draft.layout.hosts
            busy_N = draft.busy_LN.sum(axis=0)
            able = [
                n
                for n in range(len(hosts))
                if draft.has_room(unit, n) and (unit, hosts[n].node_id) not in allowance.forbidden
            ]
            if able:
                allowance.bytes_left -= size
                why = f"{name} works {work / copies:.0%} of the time on each of {copies}, above {self.high_share:.0%}"
                return [draft.copy(unit, min(able, key=lambda n: (float(busy_N[n]), n)), why)]
        elif copies > floor and work / (copies - 1) < self.low_share:
            busiest = max(draft.holders(unit), key=lambda n: (float(draft.busy_LN[:, n].sum()), -n))
            why = (
                f"{name} would work {work / (copies - 1):.0%} of the time on one copy less, below {self.low_share:.0%}"
            )
            return [draft.drop(unit, busiest, why)]
        return []
