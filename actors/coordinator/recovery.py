"""What becomes of a step that raised: its sequences are kept, the books put right, and who is guilty is found out.

Who runs alone in the next steps is `cluster.isolation`'s decision; planning them, and telling a guilty sequence its
end, are the engine's.
"""

import logging

from actors.coordinator.live_sequences import LiveSequences
from cluster.ids import SequenceId
from cluster.isolation import Isolation, Suspect
from cluster.scheduler import ScheduledBatch, Scheduler
from cluster.sequence import Sequence

LOG = logging.getLogger(__name__)


class Recovery:
    """Of one engine. `live` says what its sequences have been told, which is all that can be trusted."""

    def __init__(self, scheduler: Scheduler, live: LiveSequences) -> None:
        self._scheduler = scheduler
        self._live = live
        self._isolation = Isolation()

    def group(self) -> frozenset[SequenceId] | None:
        """Who alone may run in the next step; None, as nearly always, where everybody may."""
        return self._isolation.group()

    def skip(self) -> None:
        """Of that group nobody can run."""
        self._isolation.skip()

    def settle(self, batch: ScheduledBatch | None) -> Sequence | None:
        """After `batch`, or the planning of one, raised: the sequence that must fail, if it is known now.

        Raises AssertionError when the books cannot be put right.
        """
        suspects = self._suspects(batch)
        if batch is None or not self._abandoned(batch):
            LOG.error("the scheduler's books are written anew: every sequence is computed again from its tokens")
            self._live.rewind()
            self._scheduler.start_over(self._live.sequences)
            self._scheduler.check_integrity()
        return self._isolation.raised(suspects)

    def _abandoned(self, batch: ScheduledBatch) -> bool:
        """True where the step could be given up as if it had never been."""
        try:
            self._scheduler.abandon(batch)
            self._scheduler.check_integrity()
        except Exception:
            LOG.exception("step %d cannot be given up", batch.step)
            return False
        known = self._scheduler.num_running + self._scheduler.num_waiting
        return known == len(self._live) and not any(sequence.is_finished for sequence in self._live.sequences)

    def _suspects(self, batch: ScheduledBatch | None) -> list[Suspect]:
        """Who took part; of a step that was never planned, who would have."""
        if batch is not None:
            alive = [item for item in batch.items if self._live.get(item.sequence.seq_id) is not None]
            return [Suspect(item.sequence, item.start) for item in alive]
        group = self._isolation.group()
        by_arrival = sorted(self._live.sequences, key=lambda one: one.arrival)
        most = self._scheduler.config.max_num_seqs
        chosen = by_arrival[:most] if group is None else [one for one in by_arrival if one.seq_id in group]
        return [Suspect(one, one.num_computed) for one in chosen]
