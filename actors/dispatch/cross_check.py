"""Compares two answers to the same rows where both happen to come: exactness, checked for nothing in live traffic.

A hedge's loser and a probe answer rows that somebody else has answered too. Different bits mean that one of the two
computes wrongly; which one, nobody can tell from that alone, so it is counted and both are named. A loser mostly
comes when its round is over: then the rows are kept where it reads them, and the answer that was used beside them,
for a few rounds at a time.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch

from actors.dispatch.round_parts import Message, RemoteStats
from actors.dispatch.transport import PendingReply, TransportError
from model.numerics import same_bits

LOG = logging.getLogger(__name__)

MAX_KEPT = 2
"""Rounds whose rows are kept for losers at a time."""

MAX_ROWS = 256
"""Rows of such a round, at most."""


class CrossCheck:
    """One coordinator's."""

    def __init__(self, stats: RemoteStats) -> None:
        self._stats = stats
        self._kept = 0

    def compare(self, layer: int, used: Message, used_MD: torch.Tensor, other: str, other_MD: torch.Tensor) -> bool:
        """Whether the answer that was used, and another replica's, have the same bits."""
        if same_bits(used_MD, other_MD):
            return True
        self._stats.mismatches += 1
        first = used.link.replica.replica_id
        LOG.error("layer %d: %s and %s give different answers to the same rows", layer, first, other)
        return False

    def keep(self, layer: int, losers: Sequence[Message], output_ND: torch.Tensor, on_end: Callable[[], None]) -> None:
        """Calls `on_end`, which gives the round's rows back, when its losers have answered: or now."""
        able = [one for one in losers if one.merged is None and all(part.answered_by for part in one.parts)]
        if not able or self._kept >= MAX_KEPT or len(output_ND) > MAX_ROWS:
            return on_end()
        self._kept += 1
        waiting, used_ND = len(able), output_ND.clone()  # whoever has the answers may do with them as it likes

        def ended(message: Message, reply: PendingReply) -> None:
            nonlocal waiting
            waiting -= 1
            try:
                self._compare_late(layer, message, used_ND, reply)
            finally:
                if not waiting:
                    self._kept -= 1
                    on_end()

        for message in able:
            message.reply.when_done(partial(ended, message))
        return None

    def _compare_late(self, layer: int, message: Message, used_ND: torch.Tensor, reply: PendingReply) -> None:
        answer = None if reply.cancelled() else reply.outcome()
        if answer is None or isinstance(answer, TransportError) or answer.output is None:
            return
        at = 0
        for part in message.parts:
            stop = at + part.asked.num_rows
            if part.answered_by is not None:
                self.compare(
                    layer,
                    part.answered_by,
                    used_ND[part.asked.rows],
                    message.link.replica.replica_id,
                    answer.output[at:stop],
                )
            at = stop
