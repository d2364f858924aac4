"""Who runs next after a step raised for no known reason: its sequences in ever smaller groups, until one is left.

A step is raised by one of its sequences, or by chance. So nobody fails with it: its halves run one after the other,
whoever gets past the place where it stood is cleared, a half that raises is cut again, and only a sequence that raises
twice in steps of its own, after it was under suspicion, is guilty. Among n sequences one guilty costs about
2 * log2(n) more steps. Planning and computing those steps, and failing the guilty, are the engine's.
"""

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from cluster.ids import SequenceId
from cluster.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Suspect:
    """A sequence of a step that raised; `start` is how many of its positions were computed before."""

    sequence: Sequence
    start: int

    @property
    def is_cleared(self) -> bool:
        """True once it got past that place, or has ended."""
        return self.sequence.is_finished or self.sequence.num_computed > self.start


class Isolation:
    """Empty, and `group` None, unless something raised."""

    def __init__(self) -> None:
        self._groups: deque[tuple[Suspect, ...]] = deque()
        self._accused: Sequence | None = None

    def group(self) -> frozenset[SequenceId] | None:
        """Who alone may run in the next step; None where everybody may."""
        while self._groups:
            left = tuple(one for one in self._groups[0] if not one.is_cleared)
            if left:
                self._groups[0] = left
                return frozenset(one.sequence.seq_id for one in left)
            self._groups.popleft()
            self._accused = None
        return None

    def raised(self, suspects: Items[Suspect]) -> Sequence | None:
        """Notes that a step of these raised; returns the guilty one when that is clear now."""
        under_trial = self._groups.popleft() if self._groups else ()
        if len(suspects) == len(under_trial) == 1 and suspects[0].sequence is under_trial[0].sequence:
            return self._accuse(under_trial)
        taking_part = {one.sequence.seq_id for one in suspects}
        rest = tuple(one for one in under_trial if one.sequence.seq_id not in taking_part)
        self._put_first(*_halves(suspects), rest)
        return None

    def skip(self) -> None:
        """Gives up the trial of a group of which nobody can run now; they run with everybody again."""
        if self._groups:
            self._groups.popleft()

    def _accuse(self, alone: tuple[Suspect, ...]) -> Sequence | None:
        """Once may be chance: then it gets another step."""
        accused, self._accused = self._accused, alone[0].sequence
        if accused is alone[0].sequence:
            return accused
        self._put_first(alone)
        return None

    def _put_first(self, *groups: Iterable[Suspect]) -> None:
        self._groups.extendleft(group for group in reversed([tuple(one) for one in groups]) if group)


def _halves(suspects: Items[Suspect]) -> tuple[Items[Suspect], Items[Suspect]]:
    ordered = sorted(suspects, key=lambda one: one.sequence.arrival)
    middle = (len(ordered) + 1) // 2
    return ordered[:middle], ordered[middle:]
