"""Which experts the tokens of an engine took: each position once, for the request that wants it and for who listens.

A position is told when it is computed for the first time and is certain: not again after a preemption, not for a guess
that did not come true. A position's experts depend on nothing but the tokens up to it, so it does not matter which time
it is. How they are found out is `model.routing`'s.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from actors.coordinator.engine_io import GenerationOutput
from actors.coordinator.live_sequences import Live, LiveSequences
from actors.coordinator.trace_tap import TraceTap
from cluster.step_plan import ScheduledBatch
from model.expert_ids import ExpertIds
from model.routing import RoutingCapture, experts_of


class RoutingLog:
    """Of one engine."""

    def __init__(self, live: LiveSequences, tap: TraceTap) -> None:
        self.tap = tap
        self._live = live

    def begin(self) -> list[RoutingCapture] | None:
        """Where the next step leaves its choices; None while nobody wants them."""
        return [] if self.tap.listening or self._live.num_wanting_experts else None

    def arrived(self, live: Live) -> None:
        """A request was taken in. One that goes on from elsewhere has arrived there."""
        if self.tap.listening and not live.sequence.output_ids:
            self.tap.arrived(live.sequence.seq_id, live.sequence.num_prompt)

    def computed(self, batch: ScheduledBatch, captures: Sequence[RoutingCapture]) -> None:
        """A step's sequences have advanced; of those that ended meanwhile nothing is told."""
        news: list[tuple[Live, int, int, int]] = []
        first = 0
        for item in batch.items:
            live = self._live.get(item.sequence.seq_id)
            if live is not None:
                start, stop = max(live.next_routed, item.start), item.sequence.num_computed
                if start < stop:
                    news.append((live, first - item.start, start, stop))
            first += item.num_tokens
        if news:
            self._tell(news, experts_of(captures))

    def ended(self, outputs: Iterable[GenerationOutput]) -> None:
        """Some of these are the last of their sequences, which still live."""
        if self.tap.listening:
            for output in outputs:
                live = self._live.get(output.seq_id) if output.finish_reason is not None else None
                if live is not None:
                    self.tap.ended(output.seq_id, len(live.sequence.output_ids))

    def _tell(self, news: Sequence[tuple[Live, int, int, int]], experts_TLK: ExpertIds) -> None:
        """Row `shift + position` of the step is a position's."""
        for live, shift, start, stop in news:
            live.next_routed = stop
            if live.wants_experts:
                live.routed += [experts_TLK[shift + position].tobytes() for position in range(start, stop)]
        if not self.tap.listening:
            return
        counts = np.array([stop - start for _, _, start, stop in news])
        begins = np.repeat(np.cumsum(counts) - counts, counts)
        places = np.arange(counts.sum()) - begins + np.repeat([start for _, _, start, _ in news], counts)
        sequences = np.repeat(np.array([live.sequence.seq_id for live, *_ in news], "<u8"), counts)
        rows = places + np.repeat([shift for _, shift, _, _ in news], counts)
        self.tap.took(sequences.tobytes(), places.astype("<u4").tobytes(), experts_TLK[rows].tobytes(), len(places))
