"""The default balancing policy: from the layout that is there, the few moves that are worth it, each with its reason.

First what redundancy asks for, then balance; nothing for noise. Placing from nothing is EPLB's part (`eplb`), since
then there is nothing to keep. Letters as in `layout`.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from cluster.balance_search import Step, best_step, in_one
from cluster.eplb import place_globally, transition
from cluster.ids import NodeId
from cluster.indivisible import Indivisible
from cluster.layout import FloatArray, critical_share
from cluster.layout_draft import MANY_COPIES, Draft
from cluster.mending import Allowance, check_copies, copies_floor, copies_wanted, mend, trim
from cluster.policy import Action, Copy, Drop, Observation


def swing_of(noise: float) -> float:
    """Of two looks at one load with so much noise, the one may show so many times what the other does."""
    return (1 + noise) / (1 - noise) * (1 + 1e-9)


@dataclass(frozen=True, slots=True, eq=False)
class Rest:
    """How things were in a layer range when it was last looked at in vain.

    What part of each layer's work each expert had, and the wait over the mean's.
    """

    part_lE: FloatArray
    imbalance: float

    def has_changed(self, now: "Rest", noise: float) -> bool:
        """True when it takes more than so much noise in every load to explain what is seen now."""
        if now.imbalance > self.imbalance * swing_of(noise):
            return True
        moved_l = np.abs(now.part_lE - self.part_lE).sum(axis=1) / 2
        return float(moved_l.max()) > noise * (1 + 2 * noise)


@dataclass(frozen=True, slots=True, eq=False)
class IncrementalState:
    """The hosts that were there, and how each layer range was at rest; None where there is something to balance.

    `quiet_at` is the share of waiting at which no copy could be spared any more; None before that. `calm_at` is the
    first share that was seen since waiting became too short for anything to be evened out; None where it is not.
    """

    nodes: frozenset[NodeId]
    rests: tuple[Rest | None, ...]
    quiet_at: float | None = None
    calm_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Incremental:
    """The policy. Each layer range is looked at on its own; gains are shares of its wait for its busiest hosts.

    A copy is expected to bring only what it can where batches go to one replica whole (`indivisible`).

    At rest, moves begin when a range's load has changed by more than `noise` and moves together would gain
    `start_gain`. They go on round by round until what is left gains less than `stop_gain`; each move must gain
    `move_gain`, and up to `choosy_gain` where the range is uneven and has few copies: `choosiness` times the square of
    its imbalance (1 - even wait ÷ wait) over their number. In a round `max_ranges` ranges are looked at, those that
    lose most first, `max_moves` moves are made in each, and `budget_bytes` loaded in all, besides what nobody serves.
    After `max_searches` searches for a move no further range is begun, so that a decision takes milliseconds; those
    left have their turn in the next round. While steps wait for experts less than `busy_share` of the time (or hardly
    more, for which `noise` suffices) nothing moves for balance, and copies that the floor of two nodes does not need
    are dropped while that stays below `quiet_share`.
    Every unit has `min_copies` to `max_copies`, at least two where there are slots and two are allowed.
    """

    budget_bytes: int
    max_moves: int = 4
    max_ranges: int = 12
    max_searches: int = 48
    noise: float = 0.05
    start_gain: float = 0.01
    stop_gain: float = 0.003
    move_gain: float = 0.002
    choosy_gain: float = 0.014
    choosiness: float = 3.5
    busy_share: float = 0.05
    quiet_share: float = 0.02
    min_copies: int = 1
    max_copies: int = MANY_COPIES

    def __post_init__(self) -> None:
        if not 0 < self.move_gain <= self.stop_gain <= self.start_gain < 1:
            raise ValueError(
                f"move_gain {self.move_gain}, stop_gain {self.stop_gain} and start_gain {self.start_gain} "
                "must ascend between 0 and 1"
            )
        if not (0 <= self.choosy_gain < 1 and self.choosiness >= 0):
            raise ValueError(
                f"choosy_gain is {self.choosy_gain} and choosiness {self.choosiness}, but both must be at least 0 "
                "and the first below 1"
            )
        check_copies(self.min_copies, self.max_copies)
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise is {self.noise}, but it must be at least 0 and below 1")
        if not 0 <= self.quiet_share < self.busy_share:
            raise ValueError(f"quiet_share is {self.quiet_share}, but it must be below busy_share {self.busy_share}")
        if min(self.budget_bytes, self.max_moves, self.max_ranges, self.max_searches) < 1:
            raise ValueError(
                f"budget_bytes is {self.budget_bytes}, max_moves {self.max_moves}, max_ranges {self.max_ranges}, "
                f"max_searches {self.max_searches}, but all must be at least 1"
            )

    def __call__(
        self, seen: Observation, state: IncrementalState | None
    ) -> tuple[tuple[Action, ...], IncrementalState]:
        """One round. Raises ValueError when the budget is smaller than the largest unit."""
        grain = seen.layout.grain
        largest = int(grain.bytes_U.max())
        if self.budget_bytes < largest:
            raise ValueError(f"budget_bytes is {self.budget_bytes}, but a unit has {largest}: it could never be moved")
        restless = IncrementalState(frozenset(host.node_id for host in seen.layout.hosts), (None,) * grain.num_ranges)
        floor = copies_floor(seen.layout, copies_wanted(self.min_copies, self.max_copies))
        if not seen.layout.held_UN.any():
            placed = place_globally(seen, floor=floor, most=self.max_copies)
            return transition(seen.layout, placed, "nothing is placed yet"), restless
        draft = Draft(seen.layout, seen.work_LE, max_copies=self.max_copies)
        indivisible = Indivisible.of(seen)
        allowance = Allowance(self.budget_bytes, seen.forbidden)
        moves: list[Copy | Drop] = mend(draft, floor, allowance) + trim(draft, self.max_copies)
        if moves or state is None or state.nodes != restless.nodes:
            state = restless
        waits = critical_share(draft.busy_LN)
        if waits >= max(self.busy_share, (state.calm_at or 0.0) * swing_of(self.noise)):
            balancing, rests = self._even_out(draft, floor, allowance, state.rests, indivisible)
            return (*moves, *balancing), IncrementalState(state.nodes, rests)
        if state.calm_at is None:
            state = replace(state, calm_at=waits)
        if not moves and (state.quiet_at is None or waits < state.quiet_at / swing_of(self.noise)):
            moves = self._quieten(draft, floor)
            state = replace(state, quiet_at=None, calm_at=None) if moves else replace(state, quiet_at=waits)
        return tuple(moves), state

    def _even_out(
        self,
        draft: Draft,
        floor: int,
        allowance: Allowance,
        before: tuple[Rest | None, ...],
        indivisible: Indivisible | None,
    ) -> tuple[list[Copy | Drop], tuple[Rest | None, ...]]:
        """Moves for balance, done on the draft; and the ranges' rests after this round."""
        rests, moves, searches = list(before), list[Copy | Drop](), 0
        if indivisible is not None:
            indivisible.limit(draft)
        for which in self._to_look_at(draft, rests):
            if searches >= self.max_searches:
                break
            steps, waits = self._search(draft, which, floor, allowance, indivisible)
            searches += min(len(steps) + 1, self.max_moves)
            balancing, rests[which] = self._balance(draft, which, steps, waits, allowance, rests[which])
            moves += balancing
            for move in balancing:
                # Where another range had to give a copy up, it is not as it was.
                rests[move.unit // draft.grain.num_experts] = None
        return moves, tuple(rests)

    def _to_look_at(self, draft: Draft, rests: list[Rest | None]) -> list[int]:
        """Ranges that are not at rest, those that lose most to imbalance first."""
        now = _as_it_is(draft, 0, draft.grain.num_ranges)
        excess_L = draft.busy_LN.max(axis=1) - draft.even()
        loses = np.add.reduceat(excess_L, draft.grain.bounds[:-1]).tolist()
        open_ranges = [
            which for which, rest in enumerate(rests) if rest is None or rest.has_changed(now[which], self.noise)
        ]
        return sorted(open_ranges, key=lambda which: (-loses[which], which))[: self.max_ranges]

    def _balance(
        self,
        draft: Draft,
        which: int,
        steps: list[Step],
        waits: list[float],
        allowance: Allowance,
        rest: Rest | None,
    ) -> tuple[list[Copy | Drop], Rest | None]:
        """Moves for one range within the allowance, done on the draft; and the range's rest after this round."""
        (now,) = _as_it_is(draft, which, which + 1)
        # What steps cost other ranges is added to what this range's layers cost.
        of_range = critical_share(draft.busy_LN[draft.grain.layers(which * draft.grain.num_experts)])
        others = critical_share(draft.busy_LN) - of_range
        costs = [wait - others for wait in waits]
        least = self._least_gain(draft, which, costs[0])
        num = min(range(len(costs)), key=lambda i: costs[i] + i * least * costs[0])
        gain = 1 - costs[num] / max(costs[0], 1e-300)
        if num == 0 or gain < (self.stop_gain if rest is None else self.start_gain):
            return [], now
        moves: list[Copy | Drop] = []
        before, steps, waits = waits[0], steps[:num], waits[1 : num + 1]
        shorter = in_one(draft, steps)
        if shorter is not None and shorter.num_bytes <= allowance.bytes_left:
            steps, waits = [shorter], waits[-1:]
        for step, wait in zip(steps, waits, strict=True):
            if step.num_bytes > allowance.bytes_left:
                break
            allowance.bytes_left -= step.num_bytes
            moves += _carried_out(draft, step, before, wait)
            before = wait
        return moves, None

    def _least_gain(self, draft: Draft, which: int, wait: float) -> float:
        """What each move for a range that waits so long must gain, as a share of that.

        If loading all copies anew left it even, each would gain imbalance / num_copies on average.
        """
        first, num_experts = which * draft.grain.num_experts, draft.grain.num_experts
        imbalance = 1 - float(draft.even(draft.grain.layers(first)).sum()) / max(wait, 1e-300)
        num_copies = int(draft.copies_U[first : first + num_experts].sum())
        return max(self.move_gain, min(self.choosy_gain, self.choosiness * imbalance**2 / num_copies))

    def _search(
        self, draft: Draft, which: int, floor: int, allowance: Allowance, indivisible: Indivisible | None
    ) -> tuple[list[Step], list[float]]:
        """The greedy steps for a range, whatever they weigh, and the wait of all layers before and after each.

        The draft is as before.
        """

        def wait() -> float:
            return critical_share(draft.busy_LN) if indivisible is None else indivisible.waits(draft, which)

        layers = draft.grain.layers(which * draft.grain.num_experts)
        steps: list[Step] = []
        waits = [wait()]
        before = draft.loads
        while len(steps) < self.max_moves:
            step = best_step(draft, floor, allowance.forbidden, layers)
            if step is None:
                break
            draft.redo(step.changes)
            steps.append(step)
            waits.append(wait())
        draft.undo([change for step in steps for change in step.changes], before)
        return steps, waits

    def _quieten(self, draft: Draft, floor: int) -> list[Copy | Drop]:
        """Drops copies above the floor, the least loaded first, while steps would hardly wait for experts."""
        moves: list[Copy | Drop] = []
        spare = [int(u) for u in np.flatnonzero(draft.copies_U > floor)]
        for unit in sorted(spare, key=lambda u: (float(draft.work(u).sum()) / int(draft.copies_U[u]), u)):
            if len(moves) == self.max_moves:
                break
            host = max(draft.holders(unit), key=lambda n: (float(draft.busy_LN[:, n].sum()), -n))
            reason = f"{draft.grain.say(unit)} has little to do; {int(draft.copies_U[unit]) - 1} copies suffice"
            dropped = draft.drop(unit, host, reason)
            if critical_share(draft.busy_LN) > self.quiet_share:
                draft.redo(((unit, host, True),))
                continue
            moves.append(dropped)
        return moves


def _carried_out(draft: Draft, step: Step, before: float, after: float) -> list[Copy | Drop]:
    """The step on the draft, as actions with their reason, and the wait for the busiest hosts before and after it."""
    hosts, layer = draft.layout.hosts, step.layer
    busy_N = draft.busy_LN[layer]
    even = float(draft.even(layer))
    why = (
        f"{hosts[step.source].node_id} is {float(busy_N.max()) / even:.2f} times as busy as the mean "
        f"in layer {layer}, most of it with {draft.grain.say(step.unit)}; "
        f"the wait for the busiest hosts goes from {before:.1%} to {after:.1%} of the time"
    )
    return [draft.copy(unit, host, why) if held else draft.drop(unit, host, why) for unit, host, held in step.changes]


def _as_it_is(draft: Draft, first: int, end: int) -> list[Rest]:
    """Of each of these ranges."""
    bounds = np.array(draft.grain.bounds[first : end + 1])
    layers = slice(bounds[0], bounds[-1])
    bounds -= bounds[0]
    work_lE, waits_l = draft.work_LE[layers], draft.busy_LN[layers].max(axis=1)
    parts_lE = work_lE / np.maximum(work_lE.sum(axis=1, keepdims=True), 1e-300)
    waits = np.add.reduceat(waits_l, bounds[:-1])
    evens = np.add.reduceat(draft.even(layers), bounds[:-1])
    imbalances = (waits / np.maximum(evens, 1e-300)).tolist()
    return [
        Rest(parts_lE[low:high], imbalance)
        for (low, high), imbalance in zip(pairwise(bounds.tolist()), imbalances, strict=True)
    ]
